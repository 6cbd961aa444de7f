// Cross-entropy of a row by a group of threads (a warp, a block): forward; backward; both in one visit, which reads the
// row a second time from the cache and may write the gradient over it. An ignored row is not read. One partial sum a
// block goes to scratch; sum_partials adds them in a fixed order.
#pragma once

#include "../backend.h"
#include "bad_labels.h"
#include "element.cuh"
#include "group.cuh"

namespace accumloss::cuda {

constexpr int kElementsInFlight = 16;  // a thread loads this many before it computes

// 16-byte loads before the first use. The general kernels compute enough to hide one load, and compile in reasonable
// time with one.
template <typename T, bool kGeneral>
constexpr int kVectorsInFlight = kGeneral ? 1 : kElementsInFlight * static_cast<int>(sizeof(T)) / kVectorBytes;

// What a block adds to the sums.
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
struct ForwardArgs {
  CrossEntropyInputs inputs;
  double* lse;               // (B, T); null in forward_with_grad
  Acc* nll;                  // (B, T); null in forward_with_grad
  Partial* partials;         // (blocks,)
  BadLabel* bad_label;       // host memory
  const Acc* grad_loss_sum;  // (); forward_with_grad only, as is grad_logits
  LogitsView grad_logits;    // (B, T, V)
};

template <typename Acc>
struct BackwardArgs {
  CrossEntropyInputs inputs;
  const double* lse;  // (B, T)
  const Acc* nll;     // (B, T)
  const Acc* grad_loss_sum;
  LogitsView grad_logits;  // (B, T, V)
};

__device__ __forceinline__ int64_t row_count(const LogitsView& view) { return view.B * view.T; }

struct RowAt {
  int64_t b, t;
};

__device__ __forceinline__ RowAt row_at(const LogitsView& view, int64_t row) {
  const int64_t b = row / view.T;
  return {b, row - b * view.T};
}

template <typename T>
__device__ __forceinline__ T* row_start(const LogitsView& view, const RowAt& at) {
  return static_cast<T*>(view.data) + at.b * view.stride_b + at.t * view.stride_t;
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

// kCount a power of two. A recursion of templates: the compiler unrolls the equivalent loops only in part.
template <int kCount, typename Acc>
__device__ __forceinline__ Acc pairwise_sum(const Acc* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    return pairwise_sum<kCount / 2>(values) + pairwise_sum<kCount / 2>(values + kCount / 2);
  }
}

// What RowState::linear is in units of: beside the logits of masked classes, often the lowest number that there is, a
// sum of logits would not fit into float. A power of two changes no other bit.
constexpr double kLinearUnit = 4294967296.0;

// What the first visit of a row needs of the options. kGeneral false: no transform, no smoothing, no metrics.
//
// RowState::weighted is relative to RowState::max here, which is known only in the end: relative to the label, that of
// a masked class would leave no digits to float. finish_row() takes it to what row_result() expects.
template <typename Acc, bool kGeneral>
struct RowView {
  int64_t label;
  Transform<Acc> transform;
  const Acc* weight;  // (V,), or null; for the smoothing
  Acc reference;      // of RowState::linear, in its unit
  Acc unit_scale;     // logit_scale in that unit
  bool linear;
  bool metrics;

  __device__ __forceinline__ RowView(const CrossEntropyInputs& inputs, int64_t y, Acc z_label)
      : label(y),
        transform(inputs.options),
        weight(static_cast<const Acc*>(inputs.weight)),
        reference(static_cast<Acc>(row_reference(z_label) / kLinearUnit)),
        unit_scale(static_cast<Acc>(inputs.options.logit_scale / kLinearUnit)),
        linear(inputs.options.label_smoothing > 0),
        metrics(inputs.options.metrics) {}

  // kWidth neighbours from class j on; z holds x at first. The label becomes -inf, which adds nothing.
  template <int kWidth>
  __device__ __forceinline__ void prepare(Acc* z, int64_t j, int label_at, RowState<Acc>& state) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (kGeneral) {
        const Acc x = z[i];
        z[i] = transform.value(x);
        if (linear && i != label_at) {
          // of x: without a cap, z may be beyond float
          const Acc part = transform.softcap > 0 ? z[i] * static_cast<Acc>(1 / kLinearUnit) : x * unit_scale;
          state.linear += (weight ? weight[j + i] : Acc(1)) * (part - reference);
        }
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
      if (kGeneral && metrics && e != 0) weighted += e * (z[i] - shift);
      z[i] = e;
    }
    if (kGeneral) state.weighted = state.weighted_about(merged, scale) + weighted;
    state.max = merged;
    state.sum = state.sum * scale + pairwise_sum<kCount>(z);
  }

  // held: where the vectors also go, or null.
  template <typename T, int kVectors>
  __device__ __forceinline__ void push_vectors(const T* x, const RowSpan<T>& span, int64_t v, int stride, T* held,
                                               RowState<Acc>& state) const {
    constexpr int kWidth = RowSpan<T>::kWidth;
    typename Element<T>::Raw raw[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) raw[k] = load_vector(x + span.vector_index(v + k * stride));
    Acc z[kVectors * kWidth];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (held != nullptr) store_vector(held + (v + k * stride) * kWidth, raw[k]);
      const int64_t j = span.vector_index(v + k * stride);
      Acc part[kWidth];
      Element<T>::unpack(raw[k], part);
      prepare<kWidth>(part, j, span.label_position(label, j), state);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) z[k * kWidth + i] = part[i];
    }
    push(z, state);
  }
};

// The sums of a row over the classes other than the label, the same in every thread. kHeld: the row also goes to
// `held` in shared memory, its vectors first, then the scalars. write_gradient finds it there: every thread what it
// has stored itself, so that no barrier is needed.
template <bool kGeneral, bool kHeld, typename T, typename Group, typename Acc>
__device__ __forceinline__ RowState<Acc> reduce_row(const Group& group, const T* x, int64_t V,
                                                    const RowView<Acc, kGeneral>& row, T* held) {
  const RowSpan<T> span(x, x, V);
  constexpr int kVectors = kVectorsInFlight<T, kGeneral>;
  RowState<Acc> state;
  const int size = group.size();
  int64_t v = group.rank();
  for (; v + (kVectors - 1) * size < span.vectors; v += kVectors * size) {
    row.template push_vectors<T, kVectors>(x, span, v, size, kHeld ? held : nullptr, state);
  }
  if (kVectors > 1) {
    for (; v < span.vectors; v += size) {
      row.template push_vectors<T, 1>(x, span, v, size, kHeld ? held : nullptr, state);
    }
  }
  for (int64_t s = group.rank(); s < span.scalars(); s += size) {
    const int64_t j = span.scalar_index(s);
    const T element = x[j];
    if (kHeld) held[span.vectors * RowSpan<T>::kWidth + s] = element;
    Acc z[1] = {Element<T>::widen(element)};
    row.template prepare<1>(z, j, j == row.label ? 0 : -1, state);
    row.push(z, state);
  }
  return group.template merge<kGeneral>(state);
}

// Whether the label is the argmax of the raw logits (the first of equal ones), where its z equals the largest other z.
template <typename T, typename Group>
__device__ __forceinline__ bool wins_tie(const Group& group, const T* x, int64_t V, int64_t label) {
  const auto x_label = Element<T>::widen(x[label]);
  bool beaten = false;
  for (int64_t j = group.rank(); j < V; j += group.size()) {
    const auto x_j = Element<T>::widen(x[j]);
    beaten |= x_j > x_label || (x_j == x_label && j < label);
  }
  return !group.any(beaten);
}

// What the options make of class y: the weights that row.h asks for.
struct RowWeights {
  double target;
  double sum;

  template <typename Acc>
  static __device__ __forceinline__ RowWeights read(const CrossEntropyInputs& inputs, int64_t label, Acc) {
    return {inputs.weight ? static_cast<double>(static_cast<const Acc*>(inputs.weight)[label]) : 1.0,
            inputs.weight_sum ? *inputs.weight_sum : static_cast<double>(inputs.options.vocab_size)};
  }
};

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

// Not inlined: done once a row, and the doubles must not cost the loops over the row registers.
template <typename Acc>
__device__ __noinline__ RowResult finish_row(const RowState<Acc> state, Acc z_label, const RowWeights weights,
                                             const CrossEntropyInputs& inputs) {
  const double target = static_cast<double>(z_label);
  return row_result(exact_state(state, target), target, weights.target, weights.sum, inputs.logits.V, inputs.options);
}

// exp(z - lse) is formed from the two pieces of lse, or, where the elements are too coarse to see the difference, the
// low piece goes into the factor.
template <bool kExactExponent, typename Acc>
__device__ __noinline__ RowGrad<Acc> make_grad(double lse, double nll, const RowWeights weights, Acc grad_loss_sum,
                                               const CrossEntropyInputs& inputs) {
  RowGrad<Acc> grad(lse, nll, weights.target, weights.sum, inputs.options.vocab_size,
                    static_cast<double>(grad_loss_sum), inputs.options);
  if (!kExactExponent) grad.probability *= static_cast<Acc>(exp(-static_cast<double>(grad.lse_low)));
  return grad;
}

// dL/dx_j of kWidth neighbours from class j on; x is replaced.
template <typename T, bool kGeneral, int kWidth, typename Acc>
__device__ __forceinline__ void gradient(Acc* x, int64_t j, int label_at, const RowGrad<Acc>& grad,
                                         const Transform<Acc>& transform, const Acc* weight, bool smoothing) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const Acc z = kGeneral ? transform.value(x[i]) : x[i];
    Acc dz = grad.probability * exp_difference<Element<T>::kExactExponent>(z, grad.lse_high, grad.lse_low);
    if (kGeneral && smoothing) dz -= grad.smoothing * (weight ? weight[j + i] : Acc(1));
    if (i == label_at) dz = grad.target;
    x[i] = kGeneral ? dz * transform.slope(x[i]) : dz;
  }
}

// Every thread reads an element before it writes it, and no other thread's: out may be x. kHeld: x is read from `held`.
template <bool kGeneral, bool kHeld, typename T, typename Group, typename Acc>
__device__ __forceinline__ void write_gradient(const Group& group, const T* x, T* out, int64_t label,
                                               const RowGrad<Acc>& grad, const CrossEntropyInputs& inputs,
                                               const T* held) {
  const RowSpan<T> span(x, out, inputs.logits.V);
  constexpr int kWidth = RowSpan<T>::kWidth;
  constexpr int kVectors = kVectorsInFlight<T, kGeneral>;
  const Transform<Acc> transform(inputs.options);
  const Acc* const weight = static_cast<const Acc*>(inputs.weight);
  const bool smoothing = inputs.options.label_smoothing > 0;
  const int size = group.size();
  const auto load = [&](int64_t v) { return load_vector(kHeld ? held + v * kWidth : x + span.vector_index(v)); };
  const auto write = [&](const typename Element<T>::Raw& raw, int64_t j) {
    Acc part[kWidth];
    Element<T>::unpack(raw, part);
    gradient<T, kGeneral, kWidth>(part, j, span.label_position(label, j), grad, transform, weight, smoothing);
    stream_vector(out + j, Element<T>::pack(part));
  };
  int64_t v = group.rank();
  for (; v + (kVectors - 1) * size < span.vectors; v += kVectors * size) {
    typename Element<T>::Raw raw[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) raw[k] = load(v + k * size);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) write(raw[k], span.vector_index(v + k * size));
  }
  if (kVectors > 1) {
    for (; v < span.vectors; v += size) write(load(v), span.vector_index(v));
  }
  for (int64_t s = group.rank(); s < span.scalars(); s += size) {
    const int64_t j = span.scalar_index(s);
    Acc part[1] = {Element<T>::widen(kHeld ? held[span.vectors * kWidth + s] : x[j])};
    gradient<T, kGeneral, 1>(part, j, j == label ? 0 : -1, grad, transform, weight, smoothing);
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

// One row of forward (kGrad false) or forward_with_grad. The group's first thread adds it to *total.
template <typename T, bool kGeneral, bool kGrad, bool kHeld, typename Group>
__device__ __forceinline__ void forward_row(const Group& group, const ForwardArgs<typename Element<T>::Acc>& args,
                                            int64_t row, Partial* total, T* held = nullptr) {
  using Acc = typename Element<T>::Acc;
  const CrossEntropyInputs& inputs = args.inputs;
  const int64_t V = inputs.logits.V;
  const RowAt at = row_at(inputs.logits, row);
  const int64_t label = row_label(inputs, at);
  const bool first = group.rank() == 0;
  T* const out = kGrad ? row_start<T>(args.grad_logits, at) : nullptr;
  if (!is_item(inputs, label)) {
    double value = 0;
    if (label != inputs.options.ignore_index) {
      value = kNaN;
      if (first) {
        total->add({value, 0, inputs.options.metrics ? value : 0, 1, 0});
        *args.bad_label = BadLabel{row + 1, label};
      }
    }
    if (!kGrad && first) {
      args.lse[row] = value;
      args.nll[row] = static_cast<Acc>(value);
    }
    if (kGrad) write_zeros(group, out, V);
    return;
  }

  const T* const x = row_start<T>(inputs.logits, at);
  const Transform<Acc> transform(inputs.options);
  const Acc x_label = Element<T>::widen(x[label]);  // read here, before anything is written over it
  const Acc z_label = kGeneral ? transform.value(x_label) : x_label;
  const RowView<Acc, kGeneral> view(inputs, label, z_label);
  const RowState<Acc> state = reduce_row<kGeneral, kHeld>(group, x, V, view, held);
  bool wins = z_label > state.max;
  if (kGeneral && inputs.options.metrics && z_label == state.max) wins = wins_tie(group, x, V, label);

  const auto finish = [&] {
    const RowWeights weights = RowWeights::read(inputs, label, Acc());
    const RowResult result = finish_row(state, z_label, weights, inputs);
    const bool correct = inputs.options.metrics && wins && result.loss == result.loss;
    if (first) total->add({result.loss, weights.target, result.entropy, 1, correct});
    if (!kGrad) {
      args.lse[row] = result.lse;
      args.nll[row] = static_cast<Acc>(result.nll);
    }
    return result;
  };
  if (kGrad) {
    const RowGrad<Acc> grad = group.template once<RowGrad<Acc>>([&] {
      const RowResult result = finish();
      return make_grad<Element<T>::kExactExponent>(result.lse, result.nll, RowWeights::read(inputs, label, Acc()),
                                                   *args.grad_loss_sum, inputs);
    });
    write_gradient<kGeneral, kHeld>(group, x, out, label, grad, inputs, held);
  } else if (first) {
    finish();
  }
}

template <typename T, bool kGeneral, typename Group>
__device__ __forceinline__ void backward_row(const Group& group, const BackwardArgs<typename Element<T>::Acc>& args,
                                             int64_t row) {
  using Acc = typename Element<T>::Acc;
  const CrossEntropyInputs& inputs = args.inputs;
  const RowAt at = row_at(inputs.logits, row);
  int64_t label = row_label(inputs, at);
  T* const out = row_start<T>(args.grad_logits, at);
  if (!is_item(inputs, label)) {
    write_zeros(group, out, inputs.logits.V);
    return;
  }
  label -= inputs.options.class_offset;
  const T* const x = row_start<T>(inputs.logits, at);
  const RowGrad<Acc> grad = group.template once<RowGrad<Acc>>([&] {
    return make_grad<Element<T>::kExactExponent>(args.lse[row], static_cast<double>(args.nll[row]),
                                                 RowWeights::read(inputs, label, Acc()), *args.grad_loss_sum, inputs);
  });
  write_gradient<kGeneral, false>(group, x, out, label, grad, inputs, static_cast<const T*>(nullptr));
}

template <typename T, bool kGeneral, bool kGrad, bool kHeld>
__global__ void __launch_bounds__(kGeneral ? kMaxThreads : kMaxBlockThreads, 1)
    forward_block_kernel(const __grid_constant__ ForwardArgs<typename Element<T>::Acc> args) {
  Partial* const total = args.partials + blockIdx.x;
  if (threadIdx.x == 0) *total = Partial{};
  T* const held = kHeld ? reinterpret_cast<T*>(dynamic_shared() + BlockGroup::kSharedBytes) : nullptr;
  forward_row<T, kGeneral, kGrad, kHeld>(BlockGroup(), args, blockIdx.x, total, held);
}

template <typename T, bool kGrad, typename Group>
__global__ void __launch_bounds__(kTileThreads, 1)
    forward_tile_kernel(const __grid_constant__ ForwardArgs<typename Element<T>::Acc> args) {
  const Group group;
  Partial* const shared = reinterpret_cast<Partial*>(dynamic_shared());  // (groups,)
  Partial* const total = shared + group.index();
  if (group.rank() == 0) *total = Partial{};
  const int64_t rows = row_count(args.inputs.logits);
  int64_t row = blockIdx.x * static_cast<int64_t>(Group::kRowsPerBlock) + group.index() * Group::kRows;
  for (const int64_t end = row + Group::kRows; row < end && row < rows; ++row) {
    forward_row<T, true, kGrad, false>(group, args, row, total);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Partial sums = shared[0];
#pragma unroll 1  // once a block: not worth registers
    for (int other = 1; other < Group::kGroups; ++other) sums.add(shared[other]);
    args.partials[blockIdx.x] = sums;
  }
}

template <typename T, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, kGeneral ? 1 : 2)
    backward_block_kernel(const __grid_constant__ BackwardArgs<typename Element<T>::Acc> args) {
  backward_row<T, kGeneral>(BlockGroup(), args, blockIdx.x);
}

template <typename T, typename Group>
__global__ void __launch_bounds__(kTileThreads, 1)
    backward_tile_kernel(const __grid_constant__ BackwardArgs<typename Element<T>::Acc> args) {
  const Group group;
  const int64_t rows = row_count(args.inputs.logits);
  int64_t row = blockIdx.x * static_cast<int64_t>(Group::kRowsPerBlock) + group.index() * Group::kRows;
  for (const int64_t end = row + Group::kRows; row < end && row < rows; ++row) backward_row<T, true>(group, args, row);
}

constexpr int kSumThreads = 1024;

// One block. Every thread adds each kSumThreads-th partial, then the threads are added along a butterfly.
template <typename Acc>
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const Partial* partials,  // (count,)
                                                                   int64_t count, const CrossEntropySums sums) {
  Partial* const shared = reinterpret_cast<Partial*>(dynamic_shared());  // (kWarp,)
  Partial total = {};
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) total.add(partials[i]);
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
  if (threadIdx.x >= kWarp) return;
  total = shared[threadIdx.x];
  add_lanes();
  if (threadIdx.x == 0 && sums.totals != nullptr) {
    sums.totals[0] += total.loss;
    sums.totals[1] += static_cast<double>(total.items);
    sums.totals[2] += total.weight;
    sums.totals[3] += static_cast<double>(total.correct);
    sums.totals[4] += total.entropy;
  } else if (threadIdx.x == 0) {
    *static_cast<Acc*>(sums.loss_sum) = static_cast<Acc>(total.loss);
    *static_cast<Acc*>(sums.total_weight) = static_cast<Acc>(total.weight);
    *static_cast<Acc*>(sums.entropy_sum) = static_cast<Acc>(total.entropy);
    *sums.num_items = total.items;
    *sums.num_correct = total.correct;
  }
}

constexpr int64_t kScaleChunk = 2048;  // elements a warp scales before it moves on
constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 2048;  // at most: a launch that finds factor == 1 should end at once

template <typename T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const LogitsView values, const typename Element<T>::Acc* factor_pointer) {
  using Acc = typename Element<T>::Acc;
  const Acc factor = *factor_pointer;
  if (factor == 1) return;
  const Warp group;
  const int64_t chunks = (values.V + kScaleChunk - 1) / kScaleChunk;  // of a row
  const int64_t warps = gridDim.x * static_cast<int64_t>(kScaleThreads / kWarp);
  for (int64_t task = (blockIdx.x * static_cast<int64_t>(kScaleThreads) + threadIdx.x) / kWarp;
       task < row_count(values) * chunks; task += warps) {
    const int64_t row = task / chunks;
    const int64_t start = (task - row * chunks) * kScaleChunk;
    T* const x = row_start<T>(values, row_at(values, row)) + start;
    const RowSpan<T> span(x, x, values.V - start < kScaleChunk ? values.V - start : kScaleChunk);
    for (int64_t v = group.rank(); v < span.vectors; v += group.size()) {
      Acc part[RowSpan<T>::kWidth];
      Element<T>::unpack(load_vector(x + span.vector_index(v)), part);
#pragma unroll
      for (int i = 0; i < RowSpan<T>::kWidth; ++i) part[i] *= factor;
      stream_vector(x + span.vector_index(v), Element<T>::pack(part));
    }
    for (int64_t s = group.rank(); s < span.scalars(); s += group.size()) {
      T& element = x[span.scalar_index(s)];
      element = Element<T>::narrow(Element<T>::widen(element) * factor);
    }
  }
}

}  // namespace accumloss::cuda
