// The bodies of the ops, for a backend; bindings.cpp gives them their schemas and dispatch keys.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "backend.h"

namespace accumloss {

using torch::stable::Tensor;

// loss_sum (), num_items (), total_weight (), lse (...), num_correct (), entropy_sum (), nll (...)
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// loss_sum (), num_items (), total_weight (), num_correct (), entropy_sum (), grad_logits (..., V)
using WithGradOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// loss_sum (), num_items (), total_weight (), num_correct (), entropy_sum ()
using InPlaceOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardOutputs cross_entropy(const Backend& backend,
                             const Tensor& logits,                 // (..., V)
                             const Tensor& labels,                 // (...)
                             const std::optional<Tensor>& weight,  // (V,)
                             const LossOptions& options);

Tensor cross_entropy_backward(const Backend& backend,
                              const Tensor& grad_loss_sum,          // ()
                              const Tensor& logits,                 // (..., V)
                              const Tensor& labels,                 // (...)
                              const Tensor& lse,                    // (...)
                              const Tensor& nll,                    // (...)
                              const std::optional<Tensor>& weight,  // (V,)
                              const LossOptions& options);          // -> grad_logits (..., V)

// The same, written over logits.
void cross_entropy_backward_(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                             const Tensor& labels, const Tensor& lse, const Tensor& nll,
                             const std::optional<Tensor>& weight, const LossOptions& options);

// loss (...), nll (...), lse (...), and where options.metrics entropy (...) and argmax (...), else both empty
using TokenOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
TokenOutputs token_statistics(const Backend& backend,
                              const Tensor& logits,                 // (..., V)
                              const Tensor& labels,                 // (...)
                              const std::optional<Tensor>& weight,  // (V,)
                              const LossOptions& options);

// What comes back to the outputs, each (...).
struct TokenGradTensors {
  std::optional<Tensor> loss, nll, lse, entropy;
};
Tensor token_statistics_backward(const Backend& backend, const TokenGradTensors& grads,
                                 const Tensor& logits,                 // (..., V)
                                 const Tensor& labels,                 // (...)
                                 const Tensor& nll,                    // (...)
                                 const Tensor& lse,                    // (...)
                                 const Tensor& entropy,                // (...), or empty
                                 const std::optional<Tensor>& weight,  // (V,)
                                 const LossOptions& options);          // -> grad_logits (..., V)

// The same, written over logits.
void token_statistics_backward_(const Backend& backend, const TokenGradTensors& grads, const Tensor& logits,
                                const Tensor& labels, const Tensor& nll, const Tensor& lse, const Tensor& entropy,
                                const std::optional<Tensor>& weight, const LossOptions& options);

// loss (...), lse (...), teacher_lse (...), of_student (...), of_teacher (...): DistillationRows
using DistillationOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
DistillationOutputs distillation(const Backend& backend,
                                 const Tensor& student_logits,  // (..., V)
                                 const Tensor& teacher_logits,  // (..., V)
                                 const Tensor& labels,          // (...), which say what counts
                                 double beta, const LossOptions& options);

Tensor distillation_backward(const Backend& backend,
                             const Tensor& grad_loss,                   // (...)
                             const Tensor& student_logits,              // (..., V)
                             const Tensor& teacher_logits,              // (..., V)
                             const Tensor& labels,                      // (...)
                             const DistillationOutputs& found,          // the loss is not looked at
                             double beta, const LossOptions& options);  // -> grad_logits (..., V)

// The same, written over student_logits.
void distillation_backward_(const Backend& backend, const Tensor& grad_loss, const Tensor& student_logits,
                            const Tensor& teacher_logits, const Tensor& labels, const DistillationOutputs& found,
                            double beta, const LossOptions& options);

// loss (...), nll (...), lse (...), total (...), of_label (...), label (...): TargetRows
using TargetOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
TargetOutputs soft_cross_entropy(const Backend& backend,
                                 const Tensor& logits,                 // (..., V)
                                 const Tensor& targets,                // (..., V)
                                 const std::optional<Tensor>& weight,  // (V,)
                                 const LossOptions& options);

Tensor soft_cross_entropy_backward(const Backend& backend,
                                   const Tensor& grad_loss,              // (...)
                                   const Tensor& logits,                 // (..., V)
                                   const Tensor& targets,                // (..., V)
                                   const TargetOutputs& found,           // the loss is not looked at
                                   const std::optional<Tensor>& weight,  // (V,)
                                   const LossOptions& options);          // -> grad_logits (..., V)

// For logits that are a shard of the vocabulary: class_offset and vocab_size of the options. What that shard adds to
// each row, ShardColumns (count, ...) double.
Tensor cross_entropy_shard(const Backend& backend,
                           const Tensor& logits,                 // (..., V)
                           const Tensor& labels,                 // (...), of the whole vocabulary
                           const std::optional<Tensor>& weight,  // (vocab_size,)
                           const LossOptions& options);

// From lse and nll of the whole vocabulary.
Tensor cross_entropy_shard_backward(const Backend& backend,
                                    const Tensor& grad_loss_sum,          // ()
                                    const Tensor& logits,                 // (..., V)
                                    const Tensor& labels,                 // (...)
                                    const Tensor& lse,                    // (...)
                                    const Tensor& nll,                    // (...)
                                    const std::optional<Tensor>& weight,  // (vocab_size,)
                                    const LossOptions& options);          // -> grad_logits (..., V)

// The same, written over logits.
void cross_entropy_shard_backward_(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                                   const Tensor& labels, const Tensor& lse, const Tensor& nll,
                                   const std::optional<Tensor>& weight, const LossOptions& options);

WithGradOutputs cross_entropy_with_grad(const Backend& backend,
                                        const Tensor& grad_loss_sum,          // ()
                                        const Tensor& logits,                 // (..., V)
                                        const Tensor& labels,                 // (...)
                                        const std::optional<Tensor>& weight,  // (V,)
                                        const LossOptions& options);

// The same, the gradient written over logits.
InPlaceOutputs cross_entropy_with_grad_(const Backend& backend, const Tensor& grad_loss_sum, const Tensor& logits,
                                        const Tensor& labels, const std::optional<Tensor>& weight,
                                        const LossOptions& options);

// Adds loss_sum, num_items, total_weight, num_correct and entropy_sum to totals. With grad_loss_sum the gradient is
// written over logits.
void add_cross_entropy_(const Backend& backend,
                        const Tensor& totals,                        // (5,) double
                        const std::optional<Tensor>& grad_loss_sum,  // ()
                        const Tensor& logits,                        // (..., V)
                        const Tensor& labels,                        // (...)
                        const std::optional<Tensor>& weight,         // (V,)
                        const LossOptions& options);

// loss_sum / divisor (), and its gradient for expected_grad as what comes back to it (..., V). On CPU, where both
// quotients are of two numbers.
std::tuple<Tensor, Tensor> mean_with_grad(const Backend& backend,
                                          const Tensor& divisor,                // ()
                                          const Tensor& logits,                 // (..., V)
                                          const Tensor& labels,                 // (...)
                                          const std::optional<Tensor>& weight,  // (V,)
                                          double expected_grad, const LossOptions& options);

// values *= factor, (...) and (); nothing is written where factor is 1.
void scale_(const Backend& backend, const Tensor& values, const Tensor& factor);

// Uninitialised (rows, columns) of another tensor's dtype and device; on CPU in the memory that is kept between calls.
Tensor scratch(const Backend& backend, const Tensor& like, int64_t rows, int64_t columns);

}  // namespace accumloss
