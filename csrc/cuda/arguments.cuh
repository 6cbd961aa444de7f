// What every kernel over rows is given, what a label says of a row, and what a row hands on to be finished
// (finish.cuh).
#pragma once

#include "../row.h"
#include "element.cuh"
#include "factor.cuh"
#include "plan.h"

namespace accumloss::cuda {

template <typename Acc>
struct RowArgs {
  CrossEntropyInputs inputs;
  Pass pass;
  void* records;           // (B, T) RowRecord; null in backward, as is ended
  unsigned* ended;         // blocks of the launch that finishes the rows; 0 before it
  const double* lse;       // (B, T); backward only, as is nll
  const Acc* nll;          // (B, T)
  const Acc* grad_loss;    // (); null in forward, and where a gradient comes back to each row
  TokenGrads grads;        // that; else all null
  const Acc* entropy;      // (B, T), where grads.entropy
  int64_t* argmax;         // (B, T), of the rows that are items; or null. General kernels only
  LogitsView grad_logits;  // (B, T, V); data is null in forward
  Transform<Acc> transform;
  FactorOptions<Acc> factor;

  // No division in double on the device, where it may take as long as a short row.
  RowArgs(const CrossEntropyInputs& of, Pass which)
      : inputs(of),
        pass(which),
        records(nullptr),
        ended(nullptr),
        lse(nullptr),
        nll(nullptr),
        grad_loss(nullptr),
        grads(),
        entropy(nullptr),
        argmax(nullptr),
        grad_logits(),
        transform(of.options),
        factor(of) {}

  ACCUMLOSS_HD bool reduces() const { return pass != Pass::kBackward; }
  ACCUMLOSS_HD bool writes() const { return pass != Pass::kForward; }
};

// The one incoming gradient of all rows. Not to be read in a forward.
template <typename Acc>
__device__ __forceinline__ Acc incoming_gradient(const RowArgs<Acc>& args) {
  return args.grad_loss != nullptr ? *args.grad_loss : Acc(0);
}

// What comes back to a row, in a backward.
template <typename Acc>
__device__ __forceinline__ RowGrads<Acc> incoming_gradients(const RowArgs<Acc>& args, int64_t row) {
  if (args.grad_loss != nullptr) return {*args.grad_loss, 0, 0, 0, 0, false};
  const auto of = [row](const double* grads) { return grads != nullptr ? static_cast<Acc>(grads[row]) : Acc(0); };
  const TokenGrads& grads = args.grads;
  return {of(grads.loss),
          of(grads.nll),
          of(grads.lse),
          of(grads.entropy),
          grads.entropy != nullptr ? args.entropy[row] : Acc(0),
          true};
}

// Whether a row's gradient is to be computed. Where nothing comes back to it, it is zero whatever the logits are.
template <typename Acc>
__device__ __forceinline__ bool is_wanted(const RowArgs<Acc>& args, int64_t row) {
  if (args.grad_loss != nullptr || args.pass != Pass::kBackward) return true;
  const auto is_zero = [row](const double* grads) { return grads == nullptr || grads[row] == 0; };
  const TokenGrads& grads = args.grads;
  return !(is_zero(grads.loss) && is_zero(grads.nll) && is_zero(grads.lse) && is_zero(grads.entropy));
}

__device__ __forceinline__ int64_t row_count(const LogitsView& view) { return view.B * view.T; }

struct RowAt {
  int64_t b, t;
};

__device__ __forceinline__ RowAt row_at(const LogitsView& view, int64_t row) {
  if (row_count(view) <= 0x7fffffff) {  // a division of 64 bits takes as long as a short row
    const unsigned b = static_cast<unsigned>(row) / static_cast<unsigned>(view.T);
    return {b, static_cast<unsigned>(row) - b * static_cast<unsigned>(view.T)};
  }
  const int64_t b = row / view.T;
  return {b, row - b * view.T};
}

__device__ __forceinline__ int64_t row_offset(const LogitsView& view, const RowAt& at) {
  return at.b * view.stride_b + at.t * view.stride_t;
}

template <typename T>
__device__ __forceinline__ T* row_start(const LogitsView& view, const RowAt& at) {
  return static_cast<T*>(view.data) + row_offset(view, at);
}

// The label of a row; ignore_index where the row has none.
__device__ __forceinline__ int64_t row_label(const CrossEntropyInputs& inputs, const RowAt& at) {
  const LabelsView& labels = inputs.labels;
  const int64_t t = at.t + inputs.options.shift;
  if (t >= inputs.logits.T) return inputs.options.ignore_index;
  const int64_t offset = at.b * labels.stride_b + t * labels.stride_t;
  return labels.is_int32 ? static_cast<const int32_t*>(labels.data)[offset]
                         : static_cast<const int64_t*>(labels.data)[offset];
}

// Whether a row with this label is read. Others are ignored, or the label is bad.
__device__ __forceinline__ bool is_item(const CrossEntropyInputs& inputs, int64_t label) {
  return label != inputs.options.ignore_index && label >= 0 && label < inputs.options.vocab_size;
}

template <typename Acc>
__device__ __forceinline__ Acc class_weight(const CrossEntropyInputs& inputs, int64_t label) {
  return inputs.weight ? static_cast<const Acc*>(inputs.weight)[label] : Acc(1);
}

// What the loops over a row leave of it; rows that are no items leave nothing. kGeneral: transform, smoothing or
// metrics.
template <typename Acc, bool kGeneral>
struct RowRecord;
template <typename Acc>
struct alignas(16) RowRecord<Acc, false> {
  Acc max, sum;  // RowState
  Acc target;    // z of the label
};
template <typename Acc>
struct alignas(16) RowRecord<Acc, true> {
  Acc max, sum, target;
  Acc weighted, linear;
  int wins;  // whether the label is the argmax
};

// One thread of a row.
template <bool kGeneral, typename Acc>
__device__ __forceinline__ void record_row(const RowArgs<Acc>& args, int64_t row, const RowState<Acc>& state,
                                           Acc target, bool wins) {
  RowRecord<Acc, kGeneral> record;
  record.max = state.max;
  record.sum = state.sum;
  record.target = target;
  if constexpr (kGeneral) {
    record.weighted = state.weighted;
    record.linear = state.linear;
    record.wins = wins;
  }
  static_cast<RowRecord<Acc, kGeneral>*>(args.records)[row] = record;
}

// Every kernel that records rows.
template <typename Acc>
__device__ __forceinline__ void begin_rows(const RowArgs<Acc>& args) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && args.ended != nullptr) *args.ended = 0;
}

}  // namespace accumloss::cuda
