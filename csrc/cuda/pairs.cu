// Launches the kernels over rows of two tensors.
#include "context.h"
#include "launch.cuh"
#include "pairs.cuh"
#include "pairs.h"

namespace accumloss::cuda {
namespace {

// A block a row: as many threads as it has pieces, a warp at least.
Grid grid_of(const LogitsView& logits) {
  int threads = kWarp;
  while (threads < kMaxThreads && threads * kPiece<float> < logits.V) threads *= 2;
  return {logits.B * logits.T, threads, kPairShared};
}

// The first kernel for float, the second for double; make_args(Acc()) makes what they take.
template <typename OfFloat, typename OfDouble, typename MakeArgs>
void launch_pairs(const char* what, OfFloat* of_float, OfDouble* of_double, const LogitsView& logits,
                  const MakeArgs& make_args) {
  if (logits.B * logits.T == 0) return;
  const Context context(logits.device_index);
  if (logits.dtype == Dtype::kFloat64) {
    launch(what, of_double, grid_of(logits), context.stream(), make_args(double()));
  } else {
    launch(what, of_float, grid_of(logits), context.stream(), make_args(float()));
  }
}

}  // namespace

void forward_distillation(const DistillationInputs& inputs, const DistillationRows& to) {
  launch_pairs(
      "distillation", distillation_kernel<float>, distillation_kernel<double>, inputs.student.logits,
      [&](auto acc) { return DistillationArgs<decltype(acc)>(inputs, to, nullptr, LogitsView{}, bad_label_record()); });
}

void backward_distillation(const DistillationInputs& inputs, const DistillationRows& found, const double* grad_loss,
                           const LogitsView& grad_logits) {
  launch_pairs("distillation_backward", distillation_backward_kernel<float>, distillation_backward_kernel<double>,
               inputs.student.logits, [&](auto acc) {
                 return DistillationArgs<decltype(acc)>(inputs, found, grad_loss, grad_logits, nullptr);
               });
}

void forward_targets(const TargetInputs& inputs, const TargetRows& to) {
  launch_pairs("soft_cross_entropy", targets_kernel<float>, targets_kernel<double>, inputs.logits.logits,
               [&](auto acc) { return TargetArgs<decltype(acc)>(inputs, to, nullptr, LogitsView{}); });
}

void backward_targets(const TargetInputs& inputs, const TargetRows& found, const double* grad_loss,
                      const LogitsView& grad_logits) {
  launch_pairs("soft_cross_entropy_backward", targets_backward_kernel<float>, targets_backward_kernel<double>,
               inputs.logits.logits,
               [&](auto acc) { return TargetArgs<decltype(acc)>(inputs, found, grad_loss, grad_logits); });
}

}  // namespace accumloss::cuda
