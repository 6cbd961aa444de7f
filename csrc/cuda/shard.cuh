// What a shard of the vocabulary adds to each row, by a block a row: one read of the logits, a few doubles written.
// An ignored row is not read. The backward of a shard is that of cross_entropy.cuh.
#pragma once

#include "cross_entropy.cuh"

namespace accumloss::cuda {

template <typename Acc>
struct ShardArgs {
  CrossEntropyInputs inputs;
  ShardColumns columns;  // (., B, T)
  BadLabel* bad_label;   // host memory
};

template <typename T, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 1)
    shard_kernel(const __grid_constant__ ShardArgs<typename Element<T>::Acc> args) {
  using Acc = typename Element<T>::Acc;
  const CrossEntropyInputs& inputs = args.inputs;
  const LossOptions& options = inputs.options;
  const int64_t V = inputs.logits.V, row = blockIdx.x;
  const BlockGroup group;
  const bool first = group.rank() == 0;
  const RowAt at = row_at(inputs.logits, row);
  const int64_t class_of_all = row_label(inputs, at);
  if (!is_item(inputs, class_of_all)) {
    if (!first) return;
    const bool ignored = class_of_all == options.ignore_index;
    const double value = ignored ? 0.0 : kNaN;
    args.columns.write(row, {value, value, value, value, value}, options);
    if (!ignored) *args.bad_label = BadLabel{row + 1, class_of_all};
    return;
  }

  const int64_t label = class_of_all - options.class_offset;
  const bool has_label = label >= 0 && label < V;
  const T* const x = row_start<T>(inputs.logits, at);
  const Transform<Acc> transform(options);
  const Acc x_origin = Element<T>::widen(x[has_label ? label : 0]);
  const Acc origin = kGeneral ? transform.value(x_origin) : x_origin;
  const RowView<Acc, kGeneral> view(inputs, label, origin);
  const RowState<Acc> state = reduce_row<kGeneral, false>(group, x, V, view, static_cast<T*>(nullptr));
  double best = 0;
  if (kGeneral && options.metrics && has_label) {
    const bool wins = origin > state.max || (origin == state.max && wins_tie(group, x, V, label));
    best = wins ? static_cast<double>(x_origin) : kNaN;
  } else if (kGeneral && options.metrics) {
    RowState<Acc> raw;
    for (int64_t j = group.rank(); j < V; j += group.size()) {
      const Acc x_j = Element<T>::widen(x[j]);
      raw.max = x_j > raw.max ? x_j : raw.max;
    }
    __syncthreads();  // the sums of the row have been read by all
    best = group.merge<false>(raw).max;
  }
  if (!first) return;
  const double z = static_cast<double>(origin);
  const double weight = has_label && inputs.weight ? static_cast<double>(static_cast<const Acc*>(inputs.weight)[label])
                                                   : static_cast<double>(has_label);
  const double weight_sum = inputs.shard_weight_sum ? *inputs.shard_weight_sum : static_cast<double>(V);
  ShardRow found = shard_row(exact_state(state, z), has_label, z, weight, weight_sum, options);
  found.best = best;
  args.columns.write(row, found, options);
}

}  // namespace accumloss::cuda
