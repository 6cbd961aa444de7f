// Cross-entropy of a row by a group of threads (lanes of a warp, a block), with any options, of any type and alignment:
// forward, backward, or both in one visit, which reads the row a second time from the cache and may write the gradient
// over it. An ignored row is not read. Which of these is asked at run time: no loop over a row looks at it. What has no
// options and lies well takes the kernels of tile.cuh and block.cuh.
#pragma once

#include "arguments.cuh"
#include "finish.cuh"
#include "group.cuh"

namespace accumloss::cuda {

// What the first visit of a row needs of the options.
//
// RowState::weighted is relative to RowState::max here, which is known only in the end: relative to the label, that of
// a masked class would leave no digits to float. finish_row() takes it to what row_result() expects.
template <typename Acc>
struct RowView {
  int64_t label;
  Transform<Acc> transform;
  const Acc* weight;  // (V,), or null; for the smoothing
  Acc reference;      // of RowState::linear, in its unit
  Acc unit_scale;     // logit_scale in that unit
  bool linear;
  bool metrics;

  // Of lse and nll alone.
  __device__ __forceinline__ explicit RowView(const Transform<Acc>& of)
      : label(-1), transform(of), weight(nullptr), reference(0), unit_scale(0), linear(false), metrics(false) {}

  // z_label: of any class where the label's is not of this shard.
  __device__ __forceinline__ RowView(const RowArgs<Acc>& args, int64_t y, Acc z_label)
      : label(y),
        transform(args.transform),
        weight(static_cast<const Acc*>(args.inputs.weight)),
        reference(z_label - z_label == 0 ? z_label * static_cast<Acc>(1 / kLinearUnit) : Acc(0)),
        unit_scale(args.transform.logit_scale * static_cast<Acc>(1 / kLinearUnit)),
        linear(args.factor.share > 0),
        metrics(args.inputs.options.metrics) {}

  // kWidth neighbours from class j on; z holds x at first. The label becomes -inf, which adds nothing.
  template <int kWidth>
  __device__ __forceinline__ void prepare(Acc* z, int64_t j, int label_at, RowState<Acc>& state) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Acc x = z[i];
      z[i] = transform.value(x);
      if (linear && i != label_at) {
        // of x: without a cap, z may be beyond float
        const Acc part = transform.softcap > 0 ? z[i] * static_cast<Acc>(1 / kLinearUnit) : x * unit_scale;
        state.linear += (weight ? weight[j + i] : Acc(1)) * (part - reference);
      }
      if (i == label_at) z[i] = static_cast<Acc>(-kInfinity);
    }
  }

  // Adds kCount classes to the online sums.
  template <int kCount>
  __device__ __forceinline__ void push(Acc (&z)[kCount], RowState<Acc>& state) const {
    Acc merged = state.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) merged = z[i] > merged ? z[i] : merged;
    // Only -inf so far: any finite shift gives exp(-inf) = 0.
    const Acc shift = merged == static_cast<Acc>(-kInfinity) ? Acc(0) : merged;
    const Acc scale = exp_term(state.max - shift);
    Acc weighted = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Acc e = exp_term(z[i] - shift);
      if (metrics && e != 0) weighted += e * (z[i] - shift);
      z[i] = e;
    }
    state.weighted = state.weighted_about(merged, scale) + weighted;
    state.max = merged;
    state.sum = state.sum * scale + pairwise_sum<kCount>(z);
  }

  // x: of class j.  held: where the vector also goes, or null.
  template <typename T>
  __device__ __forceinline__ void push_vector(const T* x, int64_t j, T* held, RowState<Acc>& state) const {
    constexpr int kWidth = RowSpan<T>::kWidth;
    const typename Element<T>::Raw raw = load_vector(x);
    if (held != nullptr) store_vector(held, raw);
    Acc z[kWidth];
    Element<T>::unpack(raw, z);
    prepare<kWidth>(z, j, RowSpan<T>::label_position(label, j), state);
    push(z, state);
  }
};

// The sums of a row over the classes other than the label, the same in every thread. The row also goes to `held` in
// shared memory, unless that is null: its vectors first, then the scalars. write_gradient finds it there: every thread
// what it has stored itself, so that no barrier is needed.
template <typename T, typename Group, typename Acc>
__device__ __forceinline__ RowState<Acc> reduce_row(Group& group, const T* x, int64_t V, const RowView<Acc>& row,
                                                    T* held) {
  const RowSpan<T> span(x, x, V);
  constexpr int kWidth = RowSpan<T>::kWidth;
  RowState<Acc> state;
  const int size = group.size();
#pragma unroll 1  // it computes enough to hide a load
  for (int64_t v = group.rank(); v < span.vectors; v += size) {
    const int64_t j = span.vector_index(v);
    row.push_vector(x + j, j, held != nullptr ? held + v * kWidth : nullptr, state);
  }
#pragma unroll 1
  for (int64_t s = group.rank(); s < span.scalars(); s += size) {
    const int64_t j = span.scalar_index(s);
    const T element = x[j];
    if (held != nullptr) held[span.vectors * kWidth + s] = element;
    Acc z[1] = {Element<T>::widen(element)};
    row.template prepare<1>(z, j, j == row.label ? 0 : -1, state);
    row.push(z, state);
  }
  return group.template merge<true>(state);
}

// Whether the label is the argmax of the raw logits (the first of equal ones), where its z equals the largest other z.
template <typename T, typename Group>
__device__ __forceinline__ bool wins_tie(Group& group, const T* x, int64_t V, int64_t label) {
  const auto x_label = Element<T>::widen(x[label]);
  bool beaten = false;
#pragma unroll 1
  for (int64_t j = group.rank(); j < V; j += group.size()) {
    const auto x_j = Element<T>::widen(x[j]);
    beaten |= x_j > x_label || (x_j == x_label && j < label);
  }
  return !group.any(beaten);
}

// torch.argmax of the raw logits: the first of the largest, of which NaN is one. A second read of the row, and only
// where the label does not lead.
template <typename T, typename Group>
__device__ __forceinline__ void write_argmax(Group& group, const T* x, int64_t V, int64_t label, bool wins,
                                             int64_t* argmax) {
  using Acc = typename Element<T>::Acc;
  int64_t first = label;
  if (!wins) {  // the same decision in all threads
    LargestAt<Acc> largest;
#pragma unroll 1
    for (int64_t j = group.rank(); j < V; j += group.size()) largest.push(Element<T>::widen(x[j]), j);
    first = largest.first(group);
  }
  if (group.rank() == 0) *argmax = first;
}

// dL/dx_j of kWidth neighbours from class j on; x is replaced.
template <typename T, int kWidth, typename Acc>
__device__ __forceinline__ void gradient(Acc* x, int64_t j, int label_at, const RowFactor<Acc>& row,
                                         const Transform<Acc>& transform, const Acc* weight) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const Acc z = transform.value(x[i]);
    const Acc p = exp_difference<Element<T>::kExactExponent>(z, row.high, row.low);
    Acc dz = row.probability * p;
    if (row.entropy != 0 && p != 0) dz += row.entropy * ((row.high - z) + row.low) * p;
    if (row.smoothing != 0) dz -= row.smoothing * (weight ? weight[j + i] : Acc(1));
    if (i == label_at) dz = row.target;
    x[i] = dz * transform.slope(x[i]);
  }
}

// Every thread reads an element before it writes it, and no other thread's: out may be x. It is read from `held`,
// unless that is null.
template <typename T, typename Group, typename Acc>
__device__ __forceinline__ void write_gradient(const Group& group, const T* x, T* out, int64_t label,
                                               const RowFactor<Acc>& row, const RowArgs<Acc>& args, const T* held) {
  const RowSpan<T> span(x, out, args.inputs.logits.V);
  constexpr int kWidth = RowSpan<T>::kWidth;
  const Acc* const weight = static_cast<const Acc*>(args.inputs.weight);
  const int size = group.size();
#pragma unroll 1
  for (int64_t v = group.rank(); v < span.vectors; v += size) {
    const int64_t j = span.vector_index(v);
    Acc part[kWidth];
    Element<T>::unpack(held != nullptr ? load_vector(held + v * kWidth) : load_vector(x + j), part);
    gradient<T, kWidth>(part, j, span.label_position(label, j), row, args.transform, weight);
    stream_vector(out + j, Element<T>::pack(part));
  }
#pragma unroll 1
  for (int64_t s = group.rank(); s < span.scalars(); s += size) {
    const int64_t j = span.scalar_index(s);
    Acc part[1] = {Element<T>::widen(held != nullptr ? held[span.vectors * kWidth + s] : x[j])};
    gradient<T, 1>(part, j, j == label ? 0 : -1, row, args.transform, weight);
    out[j] = Element<T>::narrow(part[0]);
  }
}

template <typename T, typename Group>
__device__ __forceinline__ void write_zeros(const Group& group, T* out, int64_t V) {
  const RowSpan<T> span(out, out, V);
  using Acc = typename Element<T>::Acc;
  constexpr Acc kZeros[RowSpan<T>::kWidth] = {};
  for (int64_t v = group.rank(); v < span.vectors; v += group.size()) {
    stream_vector(out + span.vector_index(v), Element<T>::pack(kZeros));
  }
  for (int64_t s = group.rank(); s < span.scalars(); s += group.size()) {
    out[span.scalar_index(s)] = Element<T>::narrow(Acc(0));
  }
}

template <typename T, typename Group>
__device__ __forceinline__ void general_row(Group& group, const RowArgs<typename Element<T>::Acc>& args, int64_t row,
                                            T* held) {
  using Acc = typename Element<T>::Acc;
  const CrossEntropyInputs& inputs = args.inputs;
  const int64_t V = inputs.logits.V;
  const RowAt at = row_at(inputs.logits, row);
  int64_t label = row_label(inputs, at);
  T* const out = args.writes() ? row_start<T>(args.grad_logits, at) : nullptr;
  if (!is_item(inputs, label) || !is_wanted(args, row)) {
    if (args.writes()) write_zeros(group, out, V);
    return;
  }
  label -= inputs.options.class_offset;
  const T* const x = row_start<T>(inputs.logits, at);
  const FactorView<Acc, true> factors(args.factor, inputs, args.writes() ? incoming_gradient(args) : Acc(0));
  const Acc weight = class_weight<Acc>(inputs, label);
  RowFactor<Acc> factor;
  if (args.reduces()) {
    const Acc z_label = args.transform.value(Element<T>::widen(x[label]));  // before anything is written over it
    const RowState<Acc> state = reduce_row(group, x, V, RowView<Acc>(args, label, z_label), held);
    bool wins = z_label > state.max;
    if (inputs.options.metrics && z_label == state.max) wins = wins_tie(group, x, V, label);
    if (group.rank() == 0) record_row<true>(args, row, state, z_label, wins);
    if (args.argmax != nullptr) write_argmax(group, x, V, label, wins && state.sum == state.sum, args.argmax + row);
    if (!args.writes()) return;
    group.order();
    factor = factors.of(state, z_label, weight);
  } else {
    factor = factors.template of_lse<Element<T>::kExactExponent>(args.lse[row], args.nll[row], weight,
                                                                 incoming_gradients(args, row));
  }
  write_gradient(group, x, out, label, factor, args, held);
}

struct GeneralShape {
  int lanes;   // that share a row; of a block, all threads
  int rows;    // of a group, one after the other
  bool holds;  // the row waits in shared memory for its gradient; of a block
};

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, sizeof(typename Element<T>::Acc) == 8 ? 1 : 2)
    general_kernel(const __grid_constant__ RowArgs<typename Element<T>::Acc> args, const GeneralShape shape) {
  begin_rows(args);
  AnyGroup group = {shape.lanes, {}};
  T* const held = shape.holds ? reinterpret_cast<T*>(dynamic_shared() + kHeldHeader) : nullptr;
  const int groups = static_cast<int>(blockDim.x) / shape.lanes;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(groups) + group.index()) * shape.rows;
#pragma unroll 1
  for (int64_t row = first; row < first + shape.rows && row < row_count(args.inputs.logits); ++row) {
    general_row<T>(group, args, row, held);
  }
}

}  // namespace accumloss::cuda
