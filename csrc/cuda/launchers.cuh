// The launchers of one element type.
#pragma once

#include "bad_labels.h"
#include "context.h"
#include "cross_entropy.cuh"
#include "launch.cuh"
#include "plan.h"
#include "shard.cuh"
#include "staged.h"

namespace accumloss::cuda {

template <typename T>
struct Launchers {
  using Acc = typename Element<T>::Acc;
  static constexpr Dtype kDtype = Element<T>::kDtype;
  static constexpr bool kIsDouble = kDtype == Dtype::kFloat64;

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

  // The plan of a call on the current device; resident is known of staged.
  static Plan plan(const char* what, const Context& context, Pass pass, const LossOptions& options, int64_t V,
                   bool aligned) {
    const int capability = context.capability();
    const bool general = is_general(options);
    PlanRequest request = {V, kDtype, pass, capability, aligned, is_staged_available(capability), general};
    Plan plan = choose_plan(request);
    if constexpr (!kIsDouble) {
      if (plan.kernel != Kernel::kStaged) return plan;
      plan.resident = staged_clusters<T>(what, general, pass == Pass::kForwardWithGrad, plan, context.stream());
      if (plan.resident > 0) return plan;
      request.staged = false;  // part of a device (MIG, a green context) may have no room for a cluster
      plan = choose_plan(request);
    }
    return plan;
  }

  static Plan plan(const char* what, const Context& context, Pass pass, const CrossEntropyInputs& inputs,
                   const LogitsView* gradient) {
    return plan(what, context, pass, inputs.options, inputs.logits.V,
                gradient == nullptr || same_alignment(inputs.logits, *gradient));
  }

  // The plan with what the device says of it. Not on the way of a call.
  static Plan device_plan(const Context& context, Pass pass, int64_t V, bool aligned) {
    const LossOptions options = {0, 0, 0, 0, 0, 1, false};
    Plan found = plan("plan", context, pass, options, V, aligned);
    if (found.kernel == Kernel::kStaged) return found;
    const Grid grid = {1, found.threads, found.shared_bytes};
    const void* const kernel =
        pass == Pass::kBackward  ? reinterpret_cast<const void*>(backward_kernel(found, kIsDouble))
        : pass == Pass::kForward ? reinterpret_cast<const void*>(forward_kernel<false>(found, kIsDouble))
                                 : reinterpret_cast<const void*>(forward_kernel<true>(found, kIsDouble));
    found.resident = resident_clusters("plan", kernel, grid, context.stream());
    return found;
  }

  static int64_t blocks(const Plan& plan, int64_t rows) {
    if (plan.kernel == Kernel::kPacked) return (rows + Packed::kRowsPerBlock - 1) / Packed::kRowsPerBlock;
    if (plan.kernel == Kernel::kWarp) return (rows + Warp::kRowsPerBlock - 1) / Warp::kRowsPerBlock;
    return rows;  // of staged: partial sums, since the number of blocks depends on the device and the sums must not
  }

  using ForwardKernel = void (*)(ForwardArgs<Acc>);
  using BackwardKernel = void (*)(BackwardArgs<Acc>);

  // All but the staged ones.
  template <bool kGrad>
  static ForwardKernel forward_kernel(const Plan& plan, bool general) {
    if (plan.kernel == Kernel::kPacked) return forward_tile_kernel<T, kGrad, Packed>;
    if (plan.kernel == Kernel::kWarp) return forward_tile_kernel<T, kGrad, Warp>;
    if constexpr (kGrad && !kIsDouble) {
      if (plan.kernel == Kernel::kHeld) {
        return general ? forward_block_kernel<T, true, true, true> : forward_block_kernel<T, false, true, true>;
      }
    }
    return general ? forward_block_kernel<T, true, kGrad, false> : forward_block_kernel<T, kIsDouble, kGrad, false>;
  }

  static BackwardKernel backward_kernel(const Plan& plan, bool general) {
    return plan.kernel == Kernel::kPacked ? backward_tile_kernel<T, Packed>
           : plan.kernel == Kernel::kWarp ? backward_tile_kernel<T, Warp>
           : general                      ? backward_block_kernel<T, true>
                                          : backward_block_kernel<T, kIsDouble>;
  }

  template <bool kGrad>
  static void launch_forward(const char* what, Context& context, const Plan& plan, ForwardArgs<Acc> args,
                             const CrossEntropySums& sums) {
    const LogitsView& logits = args.inputs.logits;
    const int64_t rows = logits.B * logits.T;
    const int64_t count = blocks(plan, rows);
    const int64_t partials = count > 0 ? count : 1;
    args.partials = static_cast<Partial*>(context.scratch(partials * sizeof(Partial) + sizeof(unsigned)));
    args.bad_label = bad_label_record();
    const bool general = is_general(args.inputs.options);
    if (rows > 0 && plan.kernel == Kernel::kStaged) {
      if constexpr (!kIsDouble) {
        unsigned* const tickets = reinterpret_cast<unsigned*>(args.partials + partials);
        launch_staged<T>(what, args, general, kGrad, plan, tickets, context.stream());
      }
    } else if (rows > 0) {
      launch(what, forward_kernel<kGrad>(plan, general), Grid{count, plan.threads, plan.shared_bytes}, context.stream(),
             args);
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
    constexpr const char* kWhat = "cross_entropy";
    launch_forward<false>(kWhat, context, plan(kWhat, context, Pass::kForward, inputs, nullptr), args, sums);
  }

  // A block a row, of any length.
  static void forward_shard(const CrossEntropyInputs& inputs, double* columns) {
    const int64_t rows = inputs.logits.B * inputs.logits.T;
    if (rows == 0) return;
    Context context(inputs.logits.device_index);
    const ShardArgs<Acc> args = {inputs, {columns, rows}, bad_label_record()};
    const Grid grid = {rows, block_threads(inputs.logits.V), kHeldHeader};
    const auto kernel = is_general(inputs.options) ? shard_kernel<T, true> : shard_kernel<T, kIsDouble>;
    launch("cross_entropy_shard", kernel, grid, context.stream(), args);
  }

  static void forward_with_grad(const CrossEntropyInputs& inputs, const CrossEntropySums& sums,
                                const void* grad_loss_sum, const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    ForwardArgs<Acc> args = {};
    args.inputs = inputs;
    args.grad_loss_sum = static_cast<const Acc*>(grad_loss_sum);
    args.grad_logits = grad_logits;
    constexpr const char* kWhat = "cross_entropy_with_grad";
    launch_forward<true>(kWhat, context, plan(kWhat, context, Pass::kForwardWithGrad, inputs, &grad_logits), args,
                         sums);
  }

  static void backward(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* grad_loss_sum,
                       const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    const BackwardArgs<Acc> args = {inputs, lse, static_cast<const Acc*>(nll), static_cast<const Acc*>(grad_loss_sum),
                                    grad_logits};
    const int64_t rows = inputs.logits.B * inputs.logits.T;
    if (rows == 0) return;
    constexpr const char* kWhat = "cross_entropy_backward";
    const Plan chosen = plan(kWhat, context, Pass::kBackward, inputs, &grad_logits);
    const Grid grid = {blocks(chosen, rows), chosen.threads, chosen.shared_bytes};
    launch(kWhat, backward_kernel(chosen, is_general(inputs.options)), grid, context.stream(), args);
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
