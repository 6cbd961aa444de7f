// The launchers of one element type.
#pragma once

#include "bad_labels.h"
#include "block.cuh"
#include "context.h"
#include "finish.cuh"
#include "general.cuh"
#include "launch.cuh"
#include "plan.h"
#include "scale.cuh"
#include "shard.cuh"
#include "staged.h"
#include "tile.cuh"

namespace accumloss::cuda {

template <typename T>
struct Launchers {
  using Acc = typename Element<T>::Acc;
  static constexpr Dtype kDtype = Element<T>::kDtype;
  static constexpr bool kIsDouble = kDtype == Dtype::kFloat64;
  static constexpr int64_t kMostClasses = int64_t{1} << 30;

  // The kernels without transform, smoothing and metrics are worth their compile time for the common types only. Their
  // classes are counted by int.
  static bool is_general(const LossOptions& options, int64_t V) {
    return kIsDouble || !Transform<Acc>(options).is_identity() || options.label_smoothing > 0 || options.metrics ||
           V > kMostClasses || options.vocab_size > kMostClasses;
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

  // A plan, and whether its general kernel serves.
  struct Choice {
    Plan plan;
    bool general;
  };

  // Of a call on the current device; resident is known of the persistent ones: staged, held, partly held. A gradient
  // that lies otherwise against 16 bytes than its logits takes the general kernels.
  static Choice choose(const char* what, const Context& context, Pass pass, const LossOptions& options, int64_t V,
                       bool aligned) {
    const int capability = context.capability();
    const bool general = is_general(options, V) || !aligned;
    PlanRequest request = {V, kDtype, pass, capability, aligned, is_staged_available(capability), general};
    Plan plan = choose_plan(request);
    if constexpr (!kIsDouble) {
      if (plan.kernel == Kernel::kStaged) {
        plan.resident = staged_clusters<T>(what, general, pass == Pass::kForwardWithGrad, plan, context.stream());
        if (plan.resident > 0) return {plan, general};
        request.staged = false;  // part of a device (MIG, a green context) may have no room for a cluster
        plan = choose_plan(request);
      }
      if (is_held(plan) && !general) {
        const Grid grid = {1, plan.threads, plan.shared_bytes};
        plan.resident = resident_clusters(what, reinterpret_cast<const void*>(held_kernel<T>), grid, context.stream());
      }
    }
    return {plan, general};
  }

  static Choice choose(const char* what, const Context& context, Pass pass, const CrossEntropyInputs& inputs,
                       const LogitsView* gradient) {
    return choose(what, context, pass, inputs.options, inputs.logits.V,
                  gradient == nullptr || same_alignment(inputs.logits, *gradient));
  }

  // The plan with what the device says of it. Not on the way of a call.
  static Plan device_plan(const Context& context, Pass pass, int64_t V, bool aligned) {
    LossOptions options;
    options.vocab_size = V;
    auto [plan, general] = choose("plan", context, pass, options, V, aligned);
    if (plan.resident > 0) return plan;
    const Grid grid = {1, plan.threads, plan.shared_bytes};
    const void* const kernel = general         ? reinterpret_cast<const void*>(general_kernel<T>)
                               : is_tile(plan) ? reinterpret_cast<const void*>(tile(pass))
                                               : reinterpret_cast<const void*>(block(pass));
    plan.resident = resident_clusters("plan", kernel, grid, context.stream());
    return plan;
  }

  static bool is_held(const Plan& plan) { return plan.kernel == Kernel::kHeld || plan.kernel == Kernel::kPartlyHeld; }
  static bool is_tile(const Plan& plan) { return plan.kernel == Kernel::kPacked || plan.kernel == Kernel::kWarp; }

  using TileKernel = void (*)(RowArgs<Acc>, int);
  using BlockKernel = void (*)(RowArgs<Acc>);

  // Without options, as what follows.
  static TileKernel tile(Pass pass) {
    if constexpr (!kIsDouble) {
      return pass == Pass::kForward    ? tile_kernel<T, true, false>
             : pass == Pass::kBackward ? tile_kernel<T, false, true>
                                       : tile_kernel<T, true, true>;
    }
    return nullptr;
  }

  static BlockKernel block(Pass pass) {
    if constexpr (!kIsDouble) {
      return pass == Pass::kForward    ? block_kernel<T, true, false>
             : pass == Pass::kBackward ? block_kernel<T, false, true>
                                       : block_kernel<T, true, true>;
    }
    return nullptr;
  }

  // A whole row in kHeldParts, whatever its place against 16 bytes; or a pass of all threads in each.
  static HeldShape held_shape(const Plan& plan, int64_t V) {
    constexpr int64_t kWidth = kVector / static_cast<int64_t>(sizeof(T));
    const int64_t pass = pass_bytes(plan.threads) / kVector, vectors = (V + 2 * kWidth - 2) / kWidth;
    const int64_t part = (vectors + kHeldParts * pass - 1) / (kHeldParts * pass) * pass;
    if (plan.kernel == Kernel::kHeld) return {kHeldParts, static_cast<int>(part)};
    return {static_cast<int>((plan.shared_bytes - kHeldHeader) / kVector / pass), static_cast<int>(pass)};
  }

  // All but the staged ones.
  static void launch_rows(const char* what, const Context& context, const Choice& choice, const RowArgs<Acc>& args) {
    const auto& [plan, general] = choice;
    const int64_t rows = args.inputs.logits.B * args.inputs.logits.T;
    const bool held = plan.kernel == Kernel::kHeld;
    const int64_t each = is_tile(plan) ? static_cast<int64_t>(plan.groups) * kTileRows : 1;  // rows of a block
    const Grid grid = {(rows + each - 1) / each, plan.threads, plan.shared_bytes};
    if (general) {
      const GeneralShape shape = {plan.threads / plan.groups, is_tile(plan) ? kTileRows : 1, held};
      return launch(what, general_kernel<T>, grid, context.stream(), args, shape);
    }
    if (is_tile(plan)) return launch(what, tile(args.pass), grid, context.stream(), args, plan.groups);
    if constexpr (!kIsDouble) {
      if (is_held(plan)) {
        const Grid wave = {std::min(rows, std::max<int64_t>(plan.resident, 1)), plan.threads, plan.shared_bytes};
        return launch(what, held_kernel<T>, wave, context.stream(), args, held_shape(plan, args.inputs.logits.V));
      }
    }
    launch(what, block(args.pass), grid, context.stream(), args);
  }

  // Rows, then what finishes them.
  static void launch_sums(const char* what, Context& context, const Choice& choice, RowArgs<Acc> args,
                          const CrossEntropySums& sums, double* lse, Acc* nll, const TokenRows& tokens = {}) {
    const LogitsView& logits = args.inputs.logits;
    const int64_t rows = logits.B * logits.T;
    const bool general = choice.general;
    const int64_t threads = finish_rows(rows);
    const int64_t blocks = rows > 0 ? (rows + threads - 1) / threads : 1;
    const size_t record = general ? sizeof(RowRecord<Acc, true>) : sizeof(RowRecord<Acc, false>);
    char* const scratch = static_cast<char*>(
        context.scratch(static_cast<size_t>(rows) * record + static_cast<size_t>(blocks) * sizeof(Partial) + 16));
    args.records = scratch;
    Partial* const partials = reinterpret_cast<Partial*>(scratch + static_cast<size_t>(rows) * record);
    args.ended = reinterpret_cast<unsigned*>(partials + blocks);
    if (rows > 0 && choice.plan.kernel == Kernel::kStaged) {
      if constexpr (!kIsDouble) {
        launch_staged<T>(what, args, general, args.writes(), choice.plan, args.ended + 1, context.stream());
      }
    } else if (rows > 0) {
      launch_rows(what, context, choice, args);
    }
    const FinishArgs<Acc> finish = {args.inputs, general, args.records, partials, args.ended,
                                    sums,        lse,     nll,          tokens,   bad_label_record()};
    const auto kernel = tokens.loss == nullptr ? finish_kernel<Acc, false> : finish_kernel<Acc, true>;
    launch(what, kernel, Grid{blocks, static_cast<int>(threads), kWarp * sizeof(Partial)}, context.stream(), finish);
  }

  static void forward(const CrossEntropyInputs& inputs, const CrossEntropySums& sums, double* lse, void* nll) {
    Context context(inputs.logits.device_index);
    const RowArgs<Acc> args(inputs, Pass::kForward);
    constexpr const char* kWhat = "cross_entropy";
    launch_sums(kWhat, context, choose(kWhat, context, args.pass, inputs, nullptr), args, sums, lse,
                static_cast<Acc*>(nll));
  }

  static void forward_tokens(const CrossEntropyInputs& inputs, const TokenRows& to) {
    if (inputs.logits.B * inputs.logits.T == 0) return;
    Context context(inputs.logits.device_index);
    RowArgs<Acc> args(inputs, Pass::kForward);
    constexpr const char* kWhat = "token_statistics";
    Choice choice = choose(kWhat, context, args.pass, inputs, nullptr);
    if (inputs.options.metrics) {
      args.argmax = to.argmax;
      if (choice.plan.kernel == Kernel::kStaged) choice.plan = without_clusters(context, args.pass, inputs.logits.V);
    }
    launch_sums(kWhat, context, choice, args, {}, to.lse, static_cast<Acc*>(to.nll), to);
  }

  // What serves where the staged kernels do not: those with options.
  static Plan without_clusters(const Context& context, Pass pass, int64_t V) {
    const int capability = context.capability();
    return table({V, kDtype, pass, capability, /*aligned=*/true, /*staged=*/false, /*general=*/true});
  }

  // A block a row, of any length.
  static void forward_shard(const CrossEntropyInputs& inputs, double* columns) {
    const int64_t rows = inputs.logits.B * inputs.logits.T;
    if (rows == 0) return;
    Context context(inputs.logits.device_index);
    const ShardArgs<Acc> args = {RowArgs<Acc>(inputs, Pass::kForward), {columns, rows}, bad_label_record()};
    const Grid grid = {rows, block_threads(inputs.logits.V), kBlockHeader};
    const bool general = is_general(inputs.options, inputs.logits.V);
    const auto kernel = general ? shard_kernel<T, true> : shard_kernel<T, kIsDouble>;
    launch("cross_entropy_shard", kernel, grid, context.stream(), args);
  }

  static void forward_with_grad(const CrossEntropyInputs& inputs, const CrossEntropySums& sums,
                                const void* grad_loss_sum, const LogitsView& grad_logits) {
    Context context(inputs.logits.device_index);
    RowArgs<Acc> args(inputs, Pass::kForwardWithGrad);
    args.grad_loss = static_cast<const Acc*>(grad_loss_sum);
    args.grad_logits = grad_logits;
    constexpr const char* kWhat = "cross_entropy_with_grad";
    launch_sums(kWhat, context, choose(kWhat, context, args.pass, inputs, &grad_logits), args, sums, nullptr, nullptr);
  }

  static void backward(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* grad_loss_sum,
                       const LogitsView& grad_logits) {
    if (inputs.logits.B * inputs.logits.T == 0) return;
    Context context(inputs.logits.device_index);
    RowArgs<Acc> args(inputs, Pass::kBackward);
    args.lse = lse;
    args.nll = static_cast<const Acc*>(nll);
    args.grad_loss = static_cast<const Acc*>(grad_loss_sum);
    args.grad_logits = grad_logits;
    constexpr const char* kWhat = "cross_entropy_backward";
    launch_rows(kWhat, context, choose(kWhat, context, args.pass, inputs, &grad_logits), args);
  }

  static void backward_tokens(const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* entropy,
                              const TokenGrads& grads, const LogitsView& grad_logits) {
    if (inputs.logits.B * inputs.logits.T == 0) return;
    Context context(inputs.logits.device_index);
    RowArgs<Acc> args(inputs, Pass::kBackward);
    args.lse = lse;
    args.nll = static_cast<const Acc*>(nll);
    args.entropy = static_cast<const Acc*>(entropy);
    args.grads = grads;
    args.grad_logits = grad_logits;
    constexpr const char* kWhat = "token_statistics_backward";
    Choice choice = choose(kWhat, context, args.pass, inputs, &grad_logits);
    choice.general |= grads.entropy != nullptr;
    launch_rows(kWhat, context, choice, args);
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
