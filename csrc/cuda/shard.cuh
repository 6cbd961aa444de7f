// What a shard of the vocabulary adds to each row, by a block a row: one read of the logits, a few doubles written.
// An ignored row is not read. The backward of a shard is that of the whole vocabulary.
#pragma once

#include "bad_labels.h"
#include "block.cuh"
#include "general.cuh"

namespace accumloss::cuda {

template <typename Acc>
struct ShardArgs {
  RowArgs<Acc> rows;
  ShardColumns columns;  // (., B, T)
  BadLabel* bad_label;   // host memory
};

template <typename T, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 1)
    shard_kernel(const __grid_constant__ ShardArgs<typename Element<T>::Acc> args) {
  using Acc = typename Element<T>::Acc;
  const CrossEntropyInputs& inputs = args.rows.inputs;
  const LossOptions& options = inputs.options;
  const int64_t V = inputs.logits.V, row = blockIdx.x;
  BlockGroup group;
  const bool first = group.rank() == 0;
  const RowAt at = row_at(inputs.logits, row);
  const int64_t class_of_all = row_label(inputs, at);
  if (!is_item(inputs, class_of_all)) {
    if (!first) return;
    const bool ignored = class_of_all == options.ignore_index;
    const double value = ignored ? 0.0 : kNaN;
    args.columns.write(row, {value, value, value, value, value, value}, options);
    if (!ignored) *args.bad_label = BadLabel{row + 1, class_of_all};
    return;
  }

  const int64_t label = class_of_all - options.class_offset;
  const bool has_label = label >= 0 && label < V;
  const T* const x = row_start<T>(inputs.logits, at);
  const Acc x_origin = Element<T>::widen(x[has_label ? label : 0]);
  Acc origin = x_origin;
  RowState<Acc> state;
  double best = 0;
  if constexpr (kGeneral) {
    origin = args.rows.transform.value(x_origin);
    state = reduce_row(group, x, V, RowView<Acc>(args.rows, label, origin), static_cast<T*>(nullptr));
    if (options.metrics && has_label) {
      const bool wins = origin > state.max || (origin == state.max && wins_tie(group, x, V, label));
      best = wins ? static_cast<double>(x_origin) : kNaN;
    } else if (options.metrics) {
      RowState<Acc> raw;
      for (int64_t j = group.rank(); j < V; j += group.size()) {
        const Acc x_j = Element<T>::widen(x[j]);
        raw.max = x_j > raw.max ? x_j : raw.max;
      }
      best = group.merge<false>(raw).max;
    }
  } else {
    state = reduce_block(group, x, static_cast<int>(V), has_label ? static_cast<int>(label) : -1);
  }
  if (!first) return;
  const double z = static_cast<double>(origin);
  const double weight = has_label ? static_cast<double>(class_weight<Acc>(inputs, label)) : 0.0;
  const double weight_sum = inputs.shard_weight_sum ? *inputs.shard_weight_sum : static_cast<double>(V);
  ShardRow found = shard_row(exact_state(state, z), has_label, z, weight, weight_sum, options);
  found.best = best;
  args.columns.write(row, found, options);
}

}  // namespace accumloss::cuda
