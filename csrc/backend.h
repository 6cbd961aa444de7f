// What a device supplies: the kernels of its Backend, and the views that the ops (ops.cpp) hand to them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "options.h"

namespace accumloss {

enum class Dtype { kBFloat16, kFloat16, kFloat32, kFloat64 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// logits (B, T, V): row (b, t) starts at data + b * stride_b + t * stride_t elements; unit stride along V.
struct LogitsView {
  void* data;
  Dtype dtype;
  int64_t B, T, V;
  int64_t stride_b, stride_t;
  int32_t device_index = 0;  // of the CUDA device that holds data
};

// labels (B, T), int64 or int32: row (b, t) has label (b, t + shift), and is ignored where t + shift >= T.
struct LabelsView {
  const void* data;
  bool is_int32;
  int64_t stride_b, stride_t;
};

// Acc below is float, or double for double logits. Every pointer is memory of the logits' device.
struct CrossEntropyInputs {
  LogitsView logits;
  LabelsView labels;
  const void* weight;              // at the logits' first class, of (vocab_size,) Acc, or null
  const double* weight_sum;        // (), sum of weight, or null (no weight: vocab_size)
  const double* shard_weight_sum;  // (), of the logits' classes alone; null unless they are a shard
  LossOptions options;
};

struct CrossEntropySums {
  void* loss_sum;        // () Acc
  int64_t* num_items;    // ()
  void* total_weight;    // () Acc
  int64_t* num_correct;  // ()
  void* entropy_sum;     // () Acc
  double* totals;        // (5,) in this order: those of the call are added to it, and the others are null; or null
};

// What is told of each row, 0 where it is ignored (argmax: -1). Null where nobody asks.
struct TokenRows {
  void* loss;       // (B, T) Acc
  double* lse;      // (B, T)
  void* nll;        // (B, T) Acc
  void* entropy;    // (B, T) Acc
  int64_t* argmax;  // (B, T) first of the largest logits
};
// What comes back to them, each (B, T); null where nothing does.
struct TokenGrads {
  const double *loss, *lse, *nll, *entropy;
};

// A student's logits beside a teacher's of the same shape. labels say which rows count.
struct DistillationInputs {
  CrossEntropyInputs student;  // of its options ignore_index, shift and logit_scale
  LogitsView teacher;
  double beta;  // share of the teacher in the mixture, in [0, 1]
};
// Each (B, T), 0 where a row is ignored.
struct DistillationRows {
  void* loss;                       // Acc: beta KL(t | m) + (1 - beta) KL(s | m); beta 0: KL(t | s), beta 1: KL(s | t)
  double *lse, *teacher_lse;        // of z
  double *of_student, *of_teacher;  // KL(s | m), KL(t | m)
};

// logits beside class probabilities of the same shape and dtype; labels are not looked at.
struct TargetInputs {
  CrossEntropyInputs logits;
  LogitsView targets;
};
// Each (B, T).
struct TargetRows {
  void* loss;  // Acc: sum_j w_j q_j (lse - z_j) + z_loss lse^2, q smoothed
  void* nll;   // Acc: lse - z_y of the class y of the largest target
  double* lse;
  double* total;     // sum_j w_j q_j
  double* of_label;  // w_y q_y
  int64_t* label;    // y
};

// The kernels of one device; cpu/launch.cpp and cuda/cross_entropy.cu each fill one in.
struct Backend {
  // sums, lse (B, T) double, nll (B, T) Acc; both are 0 in ignored rows. One read of the logits of the other rows.
  void (*forward)(const CrossEntropyInputs&, const CrossEntropySums&, double* lse, void* nll);
  // grad_logits = grad_loss_sum * dL/dlogits, zeros in ignored rows. grad_logits may be inputs.logits (in place).
  void (*backward)(const CrossEntropyInputs&, const double* lse, const void* nll,
                   const void* grad_loss_sum,  // () Acc
                   const LogitsView& grad_logits);
  // forward and backward in one visit of each row. grad_logits may be inputs.logits (in place).
  void (*forward_with_grad)(const CrossEntropyInputs&, const CrossEntropySums&,
                            const void* grad_loss_sum,  // () Acc
                            const LogitsView& grad_logits);
  // For logits that are a shard of the vocabulary: ShardColumns of (., B, T), 0 in ignored rows. One read of the logits
  // of the other rows. backward serves them too, from lse and nll of the whole vocabulary.
  void (*forward_shard)(const CrossEntropyInputs&, double* columns);
  // values *= factor, contiguous; returns at once where factor is 1, decided on the device.
  void (*scale)(const LogitsView& values, const void* factor /* () Acc */);
  // Memory for a gradient, or null where torch's allocator is to serve. release(data, handle) takes it back.
  void* (*take_memory)(size_t bytes, void** handle);
  void (*release_memory)(void* data, void* handle);

  // Row by row; entropy and argmax where options.metrics. One read of the logits of the rows that count.
  void (*forward_tokens)(const CrossEntropyInputs&, const TokenRows&);
  // The gradient of them all, zeros in rows that are ignored or to which nothing comes back. entropy (B, T) Acc is read
  // where grads.entropy is there. grad_logits may be inputs.logits (in place).
  void (*backward_tokens)(const CrossEntropyInputs&, const double* lse, const void* nll, const void* entropy,
                          const TokenGrads& grads, const LogitsView& grad_logits);

  void (*forward_distillation)(const DistillationInputs&, const DistillationRows&);
  // Of the student's logits, for what comes back to loss (B, T). grad_logits may be the student's logits.
  void (*backward_distillation)(const DistillationInputs&, const DistillationRows&, const double* grad_loss,
                                const LogitsView& grad_logits);
  void (*forward_targets)(const TargetInputs&, const TargetRows&);
  void (*backward_targets)(const TargetInputs&, const TargetRows&, const double* grad_loss,
                           const LogitsView& grad_logits);
};

const Backend& cpu_backend();
const Backend& cuda_backend();  // defined where ACCUMLOSS_WITH_CUDA is

}  // namespace accumloss
