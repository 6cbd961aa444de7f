// Finishes the rows that the other kernels have recorded: in double, a row a thread, and their sums. So the loops over
// the rows are free of double, whatever its speed. A block adds up its rows, the block that ends last adds up the
// blocks; both in a fixed order, so that the bits of the sums depend on the number of rows alone.
#pragma once

#include "arguments.cuh"
#include "bad_labels.h"
#include "group.cuh"

namespace accumloss::cuda {

// Rows of a block. Few, so that they are spread over the device; more where the blocks would be too many to add up.
constexpr int64_t finish_rows(int64_t rows) { return rows <= 65536 ? 64 : 256; }

// What rows add to the sums.
struct Partial {
  double loss;
  double weight;
  double entropy;
  int64_t items;
  int64_t correct;

  __device__ __forceinline__ void add(const Partial& other) {
    loss += other.loss;
    weight += other.weight;
    entropy += other.entropy;
    items += other.items;
    correct += other.correct;
  }
};

template <typename Acc>
struct FinishArgs {
  CrossEntropyInputs inputs;
  bool general;         // which RowRecord
  const void* records;  // (B, T) RowRecord
  Partial* partials;    // (blocks,)
  unsigned* ended;
  CrossEntropySums sums;
  double* lse;          // (B, T), or null
  Acc* nll;             // (B, T), or null
  TokenRows tokens;     // the same and more, in the place of the sums; or all null
  BadLabel* bad_label;  // host memory
};

// What RowState::linear is in units of: beside the logits of masked classes, often the lowest number that there is, a
// sum of logits would not fit into float. A power of two changes no other bit.
constexpr double kLinearUnit = 4294967296.0;

// The sums as row.h takes them. origin: the z that RowView was given.
template <typename Acc>
__device__ __forceinline__ RowState<double> exact_state(const RowState<Acc>& state, double origin) {
  RowState<double> exact;
  exact.max = state.max;
  exact.sum = state.sum;
  exact.weighted = state.weighted;
  if (state.sum != 0) exact.weighted += exact.sum * (exact.max - entropy_reference(origin, exact.max));
  exact.linear = static_cast<double>(state.linear) * kLinearUnit;
  return exact;
}

// The one place where a row is finished: what it adds, and what is told of it. kTokens: TokenRows.
template <bool kTokens, typename Acc>
__device__ __forceinline__ Partial finish_row(const FinishArgs<Acc>& args, int64_t row) {
  const CrossEntropyInputs& inputs = args.inputs;
  const LossOptions& options = inputs.options;
  const int64_t label = row_label(inputs, row_at(inputs.logits, row));
  Partial found = {};
  RowResult result = {};
  if constexpr (kTokens) {
    if (options.metrics && !is_item(inputs, label)) args.tokens.argmax[row] = -1;
  }
  if (is_item(inputs, label)) {
    RowRecord<Acc, true> record = {};
    if (args.general) {
      record = static_cast<const RowRecord<Acc, true>*>(args.records)[row];
    } else {
      const RowRecord<Acc, false> plain = static_cast<const RowRecord<Acc, false>*>(args.records)[row];
      record.max = plain.max;
      record.sum = plain.sum;
      record.target = plain.target;
    }
    RowState<Acc> state;
    state.max = record.max;
    state.sum = record.sum;
    state.weighted = record.weighted;
    state.linear = record.linear;
    const double target = record.target, weight = class_weight<Acc>(inputs, label);
    const double weight_sum = inputs.weight_sum ? *inputs.weight_sum : static_cast<double>(options.vocab_size);
    result = row_result(exact_state(state, target), target, weight, weight_sum, options.vocab_size, options);
    found = {result.loss, weight, result.entropy, 1, options.metrics && record.wins && result.loss == result.loss};
  } else if (label != options.ignore_index) {
    result.lse = result.nll = kNaN;
    found = {kNaN, 0, options.metrics ? kNaN : 0.0, 1, 0};
    *args.bad_label = BadLabel{row + 1, label};
  }
  if (args.lse != nullptr) {
    args.lse[row] = result.lse;
    args.nll[row] = static_cast<Acc>(result.nll);
  }
  if constexpr (kTokens) {
    static_cast<Acc*>(args.tokens.loss)[row] = static_cast<Acc>(found.loss);
    if (options.metrics) static_cast<Acc*>(args.tokens.entropy)[row] = static_cast<Acc>(found.entropy);
  }
  return found;
}

// Of the threads of a block, in the first one; `shared` (kWarp,) is not in use.
__device__ __forceinline__ Partial block_sum(Partial total, Partial* shared) {
  const auto add_lanes = [&total] {
    total.loss = warp_sum(total.loss);
    total.weight = warp_sum(total.weight);
    total.entropy = warp_sum(total.entropy);
    total.items = warp_sum(total.items);
    total.correct = warp_sum(total.correct);
  };
  add_lanes();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    total = Partial{};
    if (threadIdx.x < blockDim.x / kWarp) total = shared[threadIdx.x];
    add_lanes();
  }
  return total;
}

template <typename Acc, bool kTokens>
__global__ void __launch_bounds__(256, 1) finish_kernel(const __grid_constant__ FinishArgs<Acc> args) {
  Partial* const shared = reinterpret_cast<Partial*>(dynamic_shared());  // (kWarp,)
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  Partial total = {};
  if (row < row_count(args.inputs.logits)) total = finish_row<kTokens>(args, row);
  if constexpr (kTokens) return;
  total = block_sum(total, shared);
  if (gridDim.x > 1) {
    bool is_last = false;
    if (threadIdx.x == 0) {
      args.partials[blockIdx.x] = total;
      __threadfence();  // before the others learn of it
      is_last = atomicAdd(args.ended, 1u) == gridDim.x - 1;
      __threadfence();  // and of them, before this block reads
    }
    if (!__syncthreads_or(is_last)) return;
    total = Partial{};
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      const Partial* const partial = args.partials + i;  // past the first-level cache, which may not know of them
      total.add({__ldcg(&partial->loss), __ldcg(&partial->weight), __ldcg(&partial->entropy), __ldcg(&partial->items),
                 __ldcg(&partial->correct)});
    }
    total = block_sum(total, shared);
  }
  if (threadIdx.x == 0) {
    const CrossEntropySums& sums = args.sums;
    if (sums.totals != nullptr) {
      sums.totals[0] += total.loss;
      sums.totals[1] += static_cast<double>(total.items);
      sums.totals[2] += total.weight;
      sums.totals[3] += static_cast<double>(total.correct);
      sums.totals[4] += total.entropy;
      return;
    }
    *static_cast<Acc*>(sums.loss_sum) = static_cast<Acc>(total.loss);
    *static_cast<Acc*>(sums.total_weight) = static_cast<Acc>(total.weight);
    *static_cast<Acc*>(sums.entropy_sum) = static_cast<Acc>(total.entropy);
    *sums.num_items = total.items;
    *sums.num_correct = total.correct;
  }
}

}  // namespace accumloss::cuda
