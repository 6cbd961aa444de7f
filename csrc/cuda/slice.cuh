// What a block has of one row in shared memory, and the two loops over it: the sums over the classes other than the
// label, and the gradient. The label's place holds -inf by then, so that neither loop looks for it.
//
// 16-bit logits without options: exp(x - c) is 2^(x log2(e) - c'), one rounding, for any reference. What the rounding
// of the reference itself moves is known and goes into the sum, and into the factor of the gradient. So a shift that
// all logits share costs nothing. Everything else subtracts the largest logit first (RowView, exp_difference).
#pragma once

#include "cross_entropy.cuh"

namespace accumloss::cuda {

constexpr float kLog2e = 1.44269504f;
// Of references: below, every exponential is 0; a logit that is the lowest number is beyond float in units of log 2.
constexpr float kLowestExponent = -1.5e6f;
// Beyond, a reference in units of log 2 is too coarse for float: such rows subtract first.
constexpr float kLargestFused = 1048576.0f;

// A thread has this many vectors of 16 bytes in flight.
constexpr int kSliceVectors = 4;

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;

// Floats as integers in the same order: -inf the lowest, NaN with a sign bit of 0 above inf.
__device__ __forceinline__ int to_ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int x) { return __int_as_float(x ^ ((x >> 31) & 0x7fffffff)); }

// Vectors of a row, rounded out to 16 bytes: `count` from vector `first` on. Of the row's first and last one only a
// part may be the row's: those elements go one to a thread.
template <typename T>
struct Slice {
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  int offset;       // class of element 0 of the stage; below 0 where the first vector is not all of the row
  int count;        // vectors
  int begin, end;   // of them, whole ones
  int front, back;  // elements at both ends
  int front_at;     // place in the stage of the first of those at the front

  // x: the row.  shift: the logarithm of the blocks.
  __device__ __forceinline__ Slice(const T* x, int V, int rank, int shift) {
    const int head = static_cast<int>(reinterpret_cast<uintptr_t>(x) % kVectorBytes / sizeof(T));
    const int vectors = (head + V + kWidth - 1) / kWidth;
    const int each = (vectors + (1 << shift) - 1) >> shift;
    const int first = rank * each;
    const int left = vectors - first;
    count = left < 0 ? 0 : left < each ? left : each;
    offset = first * kWidth - head;
    const bool has_first = first == 0 && head > 0;
    const bool has_last = count > 0 && first + count == vectors && (head + V) % kWidth != 0;
    begin = has_first ? 1 : 0;
    end = count - (has_last && count > begin ? 1 : 0);
    front_at = head;
    front = !has_first ? 0 : kWidth - head < V ? kWidth - head : V;
    back = end < count ? (head + V) % kWidth : 0;
  }

  __device__ __forceinline__ unsigned bytes() const { return static_cast<unsigned>(count) * kVectorBytes; }
  // Class of the first element of a vector.
  __device__ __forceinline__ int class_of(int vector) const { return offset + vector * kWidth; }
  __device__ __forceinline__ int ends() const { return front + back; }
  // Place in the stage of what a thread has of the ends.
  __device__ __forceinline__ int end_at(int thread) const {
    return thread < front ? front_at + thread : end * kWidth + thread - front;
  }
  // The thread of a group that reads and writes an element of the stage.
  __device__ __forceinline__ int thread_of(int place, int size) const {
    const int vector = place / kWidth;
    return vector < begin ? place - front_at
           : vector < end ? (vector - begin) & (size - 1)
                          : place - end * kWidth + front;
  }
};

// Sums of one thread, or of more. target: the label's logit by to_ordered(), of its owner.
struct Sums {
  RowState<float> state;
  int target = static_cast<int>(0x80000000);
};

// The pairs of 16 bits of one vector.
template <typename T>
struct Packed16;

template <>
struct Packed16<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr unsigned kLowest = 0xff80ff80u;  // -inf twice
};
template <>
struct Packed16<__half> {
  using Pair = __half2;
  static constexpr unsigned kLowest = 0xfc00fc00u;
};

template <typename T>
struct FusedSum {
  using Pair = typename Packed16<T>::Pair;
  static constexpr int kElements = kSliceVectors * Slice<T>::kWidth;
  float max = -INFINITY;
  float reference = kLowestExponent;  // of sum, which is in units of 2^reference
  float sum = 0;

  static __device__ __forceinline__ float reference_of(float max) { return fmaxf(max * kLog2e, kLowestExponent); }

  __device__ __forceinline__ void raise(float other) {
    max = fmaxf(max, other);  // drops a NaN, which the sum keeps
    const float raised = reference_of(max);
    sum *= exp2_flushed(reference - raised);
    reference = raised;
  }

  __device__ __forceinline__ void push(const uint4 (&raw)[kSliceVectors]) {
    Pairs<Pair> pairs[kSliceVectors];
    float x[kElements];
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) {
      pairs[k].raw = raw[k];
      float part[Slice<T>::kWidth];
      Element<T>::unpack(raw[k], part);
#pragma unroll
      for (int i = 0; i < Slice<T>::kWidth; ++i) x[k * Slice<T>::kWidth + i] = part[i];
    }
    Pair largest = pairs[0].pair[0];
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = __hmax2(largest, pairs[k].pair[i]);
    }
    raise(fmaxf(Element<T>::widen(largest.x), Element<T>::widen(largest.y)));
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = exp2_flushed(fmaf(x[i], kLog2e, -reference));
    sum += pairwise_sum<kElements>(x);
  }

  __device__ __forceinline__ void push_one(float x) {
    raise(x);
    sum += exp2_flushed(fmaf(x, kLog2e, -reference));
  }

  // In units of exp(max).
  __device__ __forceinline__ RowState<float> state() const {
    RowState<float> found;
    found.max = max;
    // What the rounding of the reference moved; nothing was summed where the reference is not the maximum's.
    found.sum = reference == kLowestExponent ? sum : sum * exp2_flushed(-fmaf(max, kLog2e, -reference));
    return found;
  }
};

// The sums of a thread over its part of the stage.
template <typename T>
__device__ __forceinline__ RowState<float> reduce_fused(const Slice<T>& slice, const T* stage, int thread, int size) {
  FusedSum<T> sums;
  constexpr int kWidth = Slice<T>::kWidth;
  int v = slice.begin + thread;
  for (; v + (kSliceVectors - 1) * size < slice.end; v += kSliceVectors * size) {
    uint4 raw[kSliceVectors];
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) raw[k] = load_vector(stage + (v + k * size) * kWidth);
    sums.push(raw);
  }
  if (v < slice.end) {
    constexpr unsigned kLowest = Packed16<T>::kLowest;
    uint4 raw[kSliceVectors];
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) {
      raw[k] = make_uint4(kLowest, kLowest, kLowest, kLowest);
      if (v + k * size < slice.end) raw[k] = load_vector(stage + (v + k * size) * kWidth);
    }
    sums.push(raw);
  }
  if (thread < slice.ends()) sums.push_one(Element<T>::widen(stage[slice.end_at(thread)]));
  return sums.state();
}

// The same for any logits and options.
template <typename T, bool kGeneral>
__device__ __forceinline__ RowState<float> reduce_any(const Slice<T>& slice, const T* stage, int thread, int size,
                                                      const RowView<float, kGeneral>& row) {
  constexpr int kWidth = Slice<T>::kWidth;
  constexpr int kVectors = kGeneral || kIsHalf<T> ? 1 : kSliceVectors;
  RowState<float> state;
  const auto fetch = [&](int v, float* z) {
    float part[kWidth];
    Element<T>::unpack(load_vector(stage + v * kWidth), part);
    const int j = slice.class_of(v);
    row.template prepare<kWidth>(part, j, kGeneral ? RowSpan<T>::label_position(row.label, j) : -1, state);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = part[i];
  };
  int v = slice.begin + thread;
  for (; v + (kVectors - 1) * size < slice.end; v += kVectors * size) {
    float z[kVectors * kWidth];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) fetch(v + k * size, z + k * kWidth);
    row.push(z, state);
  }
  if (kVectors > 1) {
    for (; v < slice.end; v += size) {
      float z[kWidth];
      fetch(v, z);
      row.push(z, state);
    }
  }
  if (thread < slice.ends()) {
    const int place = slice.end_at(thread);
    const int64_t j = slice.offset + place;
    float z[1] = {Element<T>::widen(stage[place])};
    row.template prepare<1>(z, j, j == row.label ? 0 : -1, state);
    row.push(z, state);
  }
  return state;
}

// Whether another class of the slice comes before the label in torch.argmax.
template <typename T>
__device__ __forceinline__ bool beats_label(const Slice<T>& slice, const T* stage, int thread, int size, float x_label,
                                            int label) {
  constexpr int kWidth = Slice<T>::kWidth;
  bool beaten = false;
  const auto compare = [&](int place) {
    const float x = Element<T>::widen(stage[place]);
    beaten |= x > x_label || (x == x_label && slice.offset + place < label);
  };
  for (int v = slice.begin + thread; v < slice.end; v += size) {
#pragma unroll 1
    for (int i = 0; i < kWidth; ++i) compare(v * kWidth + i);
  }
  if (thread < slice.ends()) compare(slice.end_at(thread));
  return beaten;
}

// Of one row: exp(z - max) times scale is a class's probability; and the label's own share and that of the others,
// each to its own relative precision. All NaN where the row is no distribution.
struct Shares {
  float scale;
  float others;

  // state: the classes other than the label.  z: the label's.
  __device__ __forceinline__ Shares(const RowState<float>& state, float z) {
    // max - z in two pieces
    const float d = state.max - z;
    const float part = d - state.max;
    const float low = (state.max - (d - part)) + (-z - part);
    leads_ = d <= 0;
    const float distance = fabsf(d);
    // The smaller of the two in units of the larger, and of exp(-kFar) where it would not be a normal number.
    constexpr float kFar = 44.0f;
    constexpr float kExpFar = 7.7811322e-20f;  // exp(-kFar)
    const bool is_far = distance > 64.0f;
    const float unit = is_far ? kExpFar : 1.0f;
    float e = expf((is_far ? kFar : 0.0f) - distance);
    e = distance >= 200.0f ? 0.0f : fmaf(e, leads_ ? low : -low, e);  // beyond, low may be inf - inf
    smaller_ = (leads_ ? state.sum * e : e) * unit;
    total_ = z < INFINITY ? (leads_ ? 1.0f : state.sum) + smaller_ : z - z;  // NaN of inf too
    scale = leads_ ? e / total_ * unit : 1.0f / total_;
    others = leads_ ? state.sum * e / total_ * unit : state.sum / total_;
  }

  __device__ __forceinline__ float target() const { return (leads_ ? 1.0f : smaller_) / total_; }
  __device__ __forceinline__ float lse(const RowState<float>& state, float z) const {
    return leads_ ? z + log1pf(smaller_) : state.max + logf(total_);
  }

 private:
  bool leads_;
  float smaller_, total_;  // in units of the larger of exp(max) and exp(z): the label's or the others', and both
};

// dL/dz of a row, times grad: probability exp(z - max) - smoothing w, and `target` of the label.
struct RowFactor {
  float max;
  float probability;
  float smoothing;
  float target;
};

// What the options make of it, as floats, once for a call.
struct FactorOptions {
  float hard;    // 1 - label_smoothing
  float share;   // label_smoothing / V
  float z_loss;  // 2 z_loss

  explicit FactorOptions(const CrossEntropyInputs& inputs)
      : hard(static_cast<float>(1.0 - inputs.options.label_smoothing)),
        share(static_cast<float>(inputs.options.label_smoothing / static_cast<double>(inputs.logits.V))),
        z_loss(static_cast<float>(2.0 * inputs.options.z_loss)) {}
};

// And the incoming gradient, once a thread.
template <bool kGeneral>
struct FactorView {
  FactorOptions options;
  float grad;
  float share_sum = 0;  // share times the weights of all classes

  __device__ __forceinline__ FactorView(const FactorOptions& of, const CrossEntropyInputs& inputs, float grad_loss_sum)
      : options(of), grad(grad_loss_sum) {
    if constexpr (kGeneral) {
      share_sum = options.share *
                  (inputs.weight_sum ? static_cast<float>(*inputs.weight_sum) : static_cast<float>(inputs.logits.V));
    }
  }

  // weight: of the label's class.
  __device__ __forceinline__ RowFactor of(const RowState<float>& state, float z_label, float weight) const {
    const Shares shares(state, z_label);
    const float own = options.hard * weight;
    float soft = share_sum;
    RowFactor factor;
    factor.target = -own * shares.others;
    if (kGeneral || options.z_loss > 0) {
      if (options.z_loss > 0) soft = fmaf(options.z_loss, shares.lse(state, z_label), soft);
      factor.target += fmaf(soft, shares.target(), -options.share * weight);
    }
    factor.target *= grad;
    factor.max = state.max == -INFINITY ? 0.0f : state.max;  // any: no class has a probability then
    factor.probability = grad * (own + soft) * shares.scale;
    factor.smoothing = grad * options.share;
    return factor;
  }
};

// The gradient over a slice, of what a row without options has; the label's entry is its owner's.
template <typename T>
__device__ __forceinline__ void write_fused(const Slice<T>& slice, const T* stage, T* out, int thread, int size,
                                            const RowFactor& row) {
  constexpr int kWidth = Slice<T>::kWidth;
  const float reference = FusedSum<T>::reference_of(row.max);
  const float factor = row.probability * exp2_flushed(-fmaf(row.max, kLog2e, -reference));
  const auto gradient = [&](float x) { return factor * exp2_flushed(fmaf(x, kLog2e, -reference)); };
  const auto write = [&](int v, const uint4& raw) {
    float x[kWidth];
    Element<T>::unpack(raw, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = gradient(x[i]);
    stream_vector(out + slice.class_of(v), Element<T>::pack(x));
  };
  int v = slice.begin + thread;
  for (; v + (kSliceVectors - 1) * size < slice.end; v += kSliceVectors * size) {
    uint4 raw[kSliceVectors];
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) raw[k] = load_vector(stage + (v + k * size) * kWidth);
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) write(v + k * size, raw[k]);
  }
  if (v < slice.end) {
#pragma unroll
    for (int k = 0; k < kSliceVectors; ++k) {
      if (v + k * size < slice.end) write(v + k * size, load_vector(stage + (v + k * size) * kWidth));
    }
  }
  if (thread < slice.ends()) {
    const int place = slice.end_at(thread);
    out[slice.offset + place] = Element<T>::narrow(gradient(Element<T>::widen(stage[place])));
  }
}

// The same for any logits and options.
template <typename T, bool kGeneral>
__device__ __forceinline__ void write_any(const Slice<T>& slice, const T* stage, T* out, int thread, int size,
                                          const RowFactor& row, const CrossEntropyInputs& inputs) {
  constexpr int kWidth = Slice<T>::kWidth;
  const Transform<float> transform(inputs.options);
  const float* const weight = static_cast<const float*>(inputs.weight);
  const bool smoothing = inputs.options.label_smoothing > 0;
  const auto gradient = [&](float x, int64_t j) {
    const float z = kGeneral ? transform.value(x) : x;
    float dz = row.probability * exp_difference<Element<T>::kExactExponent>(z, row.max, 0.0f);
    if (kGeneral && smoothing) dz -= row.smoothing * (weight ? weight[j] : 1.0f);
    return kGeneral ? dz * transform.slope(x) : dz;
  };
#pragma unroll(kGeneral || kIsHalf<T> ? 1 : kSliceVectors)
  for (int v = slice.begin + thread; v < slice.end; v += size) {
    const int j = slice.class_of(v);
    float x[kWidth];
    Element<T>::unpack(load_vector(stage + v * kWidth), x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = gradient(x[i], j + i);
    stream_vector(out + j, Element<T>::pack(x));
  }
  if (thread < slice.ends()) {
    const int place = slice.end_at(thread);
    const int64_t j = slice.offset + place;
    out[j] = Element<T>::narrow(gradient(Element<T>::widen(stage[place]), j));
  }
}

template <typename T>
__device__ __forceinline__ void write_zero_slice(const Slice<T>& slice, T* out, int thread, int size) {
  constexpr int kWidth = Slice<T>::kWidth;
  constexpr float kZeros[kWidth] = {};
  for (int v = slice.begin + thread; v < slice.end; v += size) {
    stream_vector(out + slice.class_of(v), Element<T>::pack(kZeros));
  }
  if (thread < slice.ends()) out[slice.offset + slice.end_at(thread)] = Element<T>::narrow(0.0f);
}

}  // namespace accumloss::cuda
