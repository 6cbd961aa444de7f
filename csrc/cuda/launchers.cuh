// The launchers of one element type.
#pragma once

#include "bad_labels.h"
#include "context.h"
#include "cross_entropy.cuh"
#include "launch.cuh"

namespace accumloss::cuda {

// Rows of at most this many classes get a warp each.
constexpr int64_t kWarpClasses = 1024;

template <typename T>
struct Launchers {
  using Acc = typename Element<T>::Acc;

  // The kernels without transform, smoothing and metrics are worth their compile time for the common types only.
  static bool is_general(const LossOptions& options) {
    return sizeof(Acc) == sizeof(double) || !Transform<Acc>(options).is_identity() || options.label_smoothing > 0 ||
           options.metrics;
  }

  static bool uses_warps(const LogitsView& logits) { return logits.V <= kWarpClasses; }

  // Enough threads for one round of loads, and for a second row of the same multiprocessor to fill the waits.
  static int block_threads(int64_t V) {
    int threads = 128;
    while (threads < BlockGroup::kMaxThreads && V >= 2 * threads * kElementsInFlight) threads *= 2;
    return threads;
  }

  static int64_t blocks(const LogitsView& logits) {
    const int64_t rows = logits.B * logits.T;
    return uses_warps(logits) ? (rows + WarpGroup::kRowsPerBlock - 1) / WarpGroup::kRowsPerBlock : rows;
  }

  static constexpr size_t kWarpSharedBytes = WarpGroup::kThreads / kWarp * sizeof(Partial);

  template <typename Args>
  static void launch_rows(const char* what, void (*warp_kernel)(Args), void (*block_kernel)(Args), const Args& args,
                          cudaStream_t stream) {
    const LogitsView& logits = args.inputs.logits;
    if (blocks(logits) == 0) return;
    if (uses_warps(logits)) {
      launch(what, warp_kernel, blocks(logits), WarpGroup::kThreads, kWarpSharedBytes, stream, args);
    } else {
      launch(what, block_kernel, blocks(logits), block_threads(logits.V), BlockGroup::kSharedBytes, stream, args);
    }
  }

  template <bool kGrad>
  static void launch_forward(const char* what, Context& context, ForwardArgs<Acc> args, const CrossEntropySums& sums) {
    const int64_t count = blocks(args.inputs.logits);
    args.partials = static_cast<Partial*>(context.scratch((count > 0 ? count : 1) * sizeof(Partial)));
    args.bad_label = bad_label_record();
    constexpr bool kOnlyGeneral = sizeof(Acc) == sizeof(double);
    auto* const block_kernel = is_general(args.inputs.options) ? forward_block_kernel<T, true, kGrad>
                                                               : forward_block_kernel<T, kOnlyGeneral, kGrad>;
    launch_rows(what, forward_warp_kernel<T, true, kGrad>, block_kernel, args, context.stream());
    launch(what, sum_partials_kernel<Acc>, 1, kSumThreads, kWarp * sizeof(Partial), context.stream(),
           static_cast<const Partial*>(args.partials), count, sums);
  }

  static void forward(const CrossEntropyInputs& inputs, const CrossEntropySums& sums, double* lse, void* nll) {
    Context context(inputs.logits.device_index);
    ForwardArgs<Acc> args = {};
    args.inputs = inputs;
    args.lse = lse;
    args.nll = static_cast<Acc*>(nll);
    launch_forward<false>("cross_entropy", context, args, sums);
  }

  static void forward_with_grad(const CrossEntropyInputs& inputs, const CrossEntropySums& sums,
                                const void* grad_loss_sum, const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    ForwardArgs<Acc> args = {};
    args.inputs = inputs;
    args.grad_loss_sum = static_cast<const Acc*>(grad_loss_sum);
    args.grad_logits = grad_logits;
    launch_forward<true>("cross_entropy_with_grad", context, args, sums);
  }

  static void backward(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* grad_loss_sum,
                       const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    const BackwardArgs<Acc> args = {inputs, lse, static_cast<const Acc*>(nll), static_cast<const Acc*>(grad_loss_sum),
                                    grad_logits};
    constexpr bool kOnlyGeneral = sizeof(Acc) == sizeof(double);
    auto* const block_kernel =
        is_general(inputs.options) ? backward_block_kernel<T, true> : backward_block_kernel<T, kOnlyGeneral>;
    launch_rows("cross_entropy_backward", backward_warp_kernel<T, true>, block_kernel, args, context.stream());
  }

  static void scale(const LogitsView& values, const void* factor) {
    const int64_t tasks = values.B * values.T * ((values.V + kScaleChunk - 1) / kScaleChunk);
    if (tasks == 0) return;
    Context context(values.device_index);
    constexpr int64_t kWarps = kScaleThreads / kWarp;
    const int64_t needed = (tasks + kWarps - 1) / kWarps;
    launch("scale", scale_kernel<T>, needed < kScaleBlocks ? needed : kScaleBlocks, kScaleThreads, 0, context.stream(),
           values, static_cast<const Acc*>(factor));
  }
};

}  // namespace accumloss::cuda
