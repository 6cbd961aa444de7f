// The launchers of one element type.
#pragma once

#include "bad_labels.h"
#include "context.h"
#include "cross_entropy.cuh"
#include "launch.cuh"
#include "plan.h"
#include "staged.h"

namespace accumloss::cuda {

template <typename T>
struct Launchers {
  using Acc = typename Element<T>::Acc;
  static constexpr bool kIsDouble = sizeof(Acc) == sizeof(double);

  // The kernels without transform, smoothing and metrics are worth their compile time for the common types only.
  static bool is_general(const LossOptions& options) {
    return kIsDouble || !Transform<Acc>(options).is_identity() || options.label_smoothing > 0 || options.metrics;
  }

  // Whether each row of two views of one shape starts at the same place against 16 bytes.
  static bool same_alignment(const LogitsView& a, const LogitsView& b) {
    const auto differ = [](int64_t x, int64_t y) {
      return (x - y) * static_cast<int64_t>(sizeof(T)) % kVectorBytes != 0;
    };
    const auto offset = [](const LogitsView& view) { return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes; };
    return offset(a) == offset(b) && (a.B == 1 || !differ(a.stride_b, b.stride_b)) &&
           (a.T == 1 || !differ(a.stride_t, b.stride_t));
  }

  static Plan plan(const Context& context, Pass pass, const LogitsView& logits, const LogitsView* gradient) {
    const int capability = context.device().capability;
    return choose_plan({logits.V, logits.dtype, pass, capability,
                        gradient == nullptr || same_alignment(logits, *gradient), is_staged_available(capability)});
  }

  static int64_t blocks(const Plan& plan, int64_t rows, const Device& device) {
    if (plan.kernel == Kernel::kPacked) return (rows + Packed::kRowsPerBlock - 1) / Packed::kRowsPerBlock;
    if (plan.kernel == Kernel::kWarp) return (rows + Warp::kRowsPerBlock - 1) / Warp::kRowsPerBlock;
    if (plan.kernel == Kernel::kStaged) return staged_blocks(plan, rows, device);
    return rows;
  }

  // One partial sum a block or, where the number of blocks depends on the device, a row: the sums must not.
  static int64_t partials(const Plan& plan, int64_t rows, const Device& device) {
    return plan.kernel == Kernel::kStaged ? rows : blocks(plan, rows, device);
  }

  template <bool kGrad>
  static void launch_forward(const char* what, Context& context, const Plan& plan, ForwardArgs<Acc> args,
                             const CrossEntropySums& sums) {
    const LogitsView& logits = args.inputs.logits;
    const int64_t rows = logits.B * logits.T;
    const Device device = context.device();
    const int64_t count = partials(plan, rows, device);
    args.partials = static_cast<Partial*>(context.scratch((count > 0 ? count : 1) * sizeof(Partial)));
    args.bad_label = bad_label_record();
    const Grid grid = {blocks(plan, rows, device), plan.threads, plan.shared_bytes};
    const bool general = is_general(args.inputs.options);
    if (rows > 0) {
      switch (plan.kernel) {
        case Kernel::kPacked:
          launch(what, forward_tile_kernel<T, kGrad, Packed>, grid, context.stream(), args);
          break;
        case Kernel::kWarp:
          launch(what, forward_tile_kernel<T, kGrad, Warp>, grid, context.stream(), args);
          break;
        case Kernel::kStaged:
          if constexpr (!kIsDouble) launch_staged<T>(what, args, general, kGrad, plan, device, context.stream());
          break;
        case Kernel::kHeld:
          if constexpr (kGrad && !kIsDouble) {
            launch(what,
                   general ? forward_block_kernel<T, true, true, true> : forward_block_kernel<T, false, true, true>,
                   grid, context.stream(), args);
          }
          break;
        case Kernel::kBlock:
          launch(
              what,
              general ? forward_block_kernel<T, true, kGrad, false> : forward_block_kernel<T, kIsDouble, kGrad, false>,
              grid, context.stream(), args);
      }
    }
    launch(what, sum_partials_kernel<Acc>, Grid{1, kSumThreads, kWarp * sizeof(Partial)}, context.stream(),
           static_cast<const Partial*>(args.partials), count, sums);
  }

  static void forward(const CrossEntropyInputs& inputs, const CrossEntropySums& sums, double* lse, void* nll) {
    Context context(inputs.logits.device_index);
    ForwardArgs<Acc> args = {};
    args.inputs = inputs;
    args.lse = lse;
    args.nll = static_cast<Acc*>(nll);
    launch_forward<false>("cross_entropy", context, plan(context, Pass::kForward, inputs.logits, nullptr), args, sums);
  }

  static void forward_with_grad(const CrossEntropyInputs& inputs, const CrossEntropySums& sums,
                                const void* grad_loss_sum, const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    ForwardArgs<Acc> args = {};
    args.inputs = inputs;
    args.grad_loss_sum = static_cast<const Acc*>(grad_loss_sum);
    args.grad_logits = grad_logits;
    launch_forward<true>("cross_entropy_with_grad", context,
                         plan(context, Pass::kForwardWithGrad, inputs.logits, &grad_logits), args, sums);
  }

  static void backward(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* grad_loss_sum,
                       const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    const BackwardArgs<Acc> args = {inputs, lse, static_cast<const Acc*>(nll), static_cast<const Acc*>(grad_loss_sum),
                                    grad_logits};
    const int64_t rows = inputs.logits.B * inputs.logits.T;
    if (rows == 0) return;
    const Plan chosen = plan(context, Pass::kBackward, inputs.logits, &grad_logits);
    const Grid grid = {blocks(chosen, rows, context.device()), chosen.threads, chosen.shared_bytes};
    auto* const kernel = chosen.kernel == Kernel::kPacked ? backward_tile_kernel<T, Packed>
                         : chosen.kernel == Kernel::kWarp ? backward_tile_kernel<T, Warp>
                         : is_general(inputs.options)     ? backward_block_kernel<T, true>
                                                          : backward_block_kernel<T, kIsDouble>;
    launch("cross_entropy_backward", kernel, grid, context.stream(), args);
  }

  static void scale(const LogitsView& values, const void* factor) {
    const int64_t tasks = values.B * values.T * ((values.V + kScaleChunk - 1) / kScaleChunk);
    if (tasks == 0) return;
    Context context(values.device_index);
    constexpr int64_t kWarps = kScaleThreads / kWarp;
    const int64_t needed = (tasks + kWarps - 1) / kWarps;
    launch("scale", scale_kernel<T>, Grid{needed < kScaleBlocks ? needed : kScaleBlocks, kScaleThreads, 0},
           context.stream(), values, static_cast<const Acc*>(factor));
  }
};

}  // namespace accumloss::cuda
