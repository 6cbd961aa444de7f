// The two loops over a row without options, or over a block's slice of one: the sums over the classes other than the
// label, and the gradient. The row is in shared memory, where -inf stands in the label's place, or in global memory.
//
// 16-bit logits: exp(x - c) is 2^(x log2(e) - c'), one rounding, for any reference. What the rounding of the reference
// itself moves is known and goes into the sum, and into the factor of the gradient. So a shift that all logits share
// costs nothing. Everything else subtracts the largest logit first (ExactSum, exp_difference).
#pragma once

#include <type_traits>

#include "arguments.cuh"

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

constexpr int kNoLabel = -0x7fffffff - 1;  // of a row that is no item

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

// Words of a vector.
template <typename T>
struct Word;
template <>
struct Word<float> {
  static constexpr unsigned kLowest = 0xff800000u;  // -inf
};
template <>
struct Word<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr unsigned kLowest = 0xff80ff80u;  // -inf twice
};
template <>
struct Word<__half> {
  using Pair = __half2;
  static constexpr unsigned kLowest = 0xfc00fc00u;
};

// A vector of -inf.
template <typename T>
__device__ __forceinline__ typename Element<T>::Raw lowest_vector() {
  constexpr unsigned kLowest = Word<T>::kLowest;
  if constexpr (kIsHalf<T>) {
    return make_uint4(kLowest, kLowest, kLowest, kLowest);
  } else {
    return make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  }
}

// A vector with -inf in one place. By words, as no register has an index.
template <typename T>
__device__ __forceinline__ typename Element<T>::Raw without(typename Element<T>::Raw raw, int place) {
  if constexpr (kIsHalf<T>) {
    const unsigned keep = place % 2 == 0 ? 0xffff0000u : 0x0000ffffu, lowest = Word<T>::kLowest & ~keep;
    const int word = place / 2;
    raw.x = word == 0 ? (raw.x & keep) | lowest : raw.x;
    raw.y = word == 1 ? (raw.y & keep) | lowest : raw.y;
    raw.z = word == 2 ? (raw.z & keep) | lowest : raw.z;
    raw.w = word == 3 ? (raw.w & keep) | lowest : raw.w;
  } else {
    raw.x = place == 0 ? -INFINITY : raw.x;
    raw.y = place == 1 ? -INFINITY : raw.y;
    raw.z = place == 2 ? -INFINITY : raw.z;
    raw.w = place == 3 ? -INFINITY : raw.w;
  }
  return raw;
}

template <typename T>
struct FusedSum {  // of 16-bit logits up to 2^20
  using Pair = typename Word<T>::Pair;
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

// The same by differences to the largest logit: for float, and for 16-bit logits of any size.
template <typename T>
struct ExactSum {
  RowState<float> found;

  template <int kCount>
  __device__ __forceinline__ void add(float (&x)[kCount]) {
    float merged = found.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) merged = fmaxf(merged, x[i]);  // drops a NaN, which the sum keeps
    // Only -inf so far: any finite shift gives exp(-inf) = 0.
    const float shift = merged == -INFINITY ? 0.0f : merged;
    const float scale = exp_term(found.max - shift);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = exp_term(x[i] - shift);
    found.max = merged;
    found.sum = found.sum * scale + pairwise_sum<kCount>(x);
  }
  template <int kVectors>
  __device__ __forceinline__ void push(const typename Element<T>::Raw (&raw)[kVectors]) {
    float x[kVectors * Slice<T>::kWidth];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float part[Slice<T>::kWidth];
      Element<T>::unpack(raw[k], part);
#pragma unroll
      for (int i = 0; i < Slice<T>::kWidth; ++i) x[k * Slice<T>::kWidth + i] = part[i];
    }
    add(x);
  }
  __device__ __forceinline__ void push_one(float x) {
    float one[1] = {x};
    add(one);
  }
  __device__ __forceinline__ RowState<float> state() const { return found; }
};

template <typename T>
using PlainSum = std::conditional_t<kIsHalf<T>, FusedSum<T>, ExactSum<T>>;

// A thread's part of the vectors [begin, end), kVectors of them in flight. kFindsLabel: label is the place of the
// label's logit, if it is in these vectors; else it has been taken out. kFar: by load_far().
template <bool kFindsLabel, int kVectors, bool kFar = false, typename T, typename Sum>
__device__ __forceinline__ void reduce_vectors(Sum& sums, const T* stage, int begin, int end, int thread, int size,
                                               int label = -1) {
  constexpr int kWidth = Slice<T>::kWidth;
  const auto load = [stage](int v) {
    if constexpr (kFar) return load_far(stage + v * kWidth);
    return load_vector(stage + v * kWidth);
  };
  const int vector = label >= 0 ? label / kWidth : -1;
  // The first vector of the thread's pass that has the label.
  const int pass = kFindsLabel && vector >= begin && ((vector - begin) & (size - 1)) == thread
                       ? begin + thread + (vector - begin) / (kVectors * size) * (kVectors * size)
                       : -1;
#pragma unroll 1
  for (int v = begin + thread; v < end; v += kVectors * size) {
    typename Element<T>::Raw raw[kVectors];
    if (v + (kVectors - 1) * size < end) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) raw[k] = load(v + k * size);
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        raw[k] = lowest_vector<T>();
        if (v + k * size < end) raw[k] = load(v + k * size);
      }
    }
    if (kFindsLabel && v == pass) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (v + k * size == vector) raw[k] = without<T>(raw[k], label % kWidth);
      }
    }
    sums.push(raw);
  }
}

// The sums of a thread over its part of a slice.
template <bool kFindsLabel, typename Sum, int kVectors = kSliceVectors, typename T>
__device__ __forceinline__ RowState<float> reduce_slice(const Slice<T>& slice, const T* stage, int thread, int size,
                                                        int label = -1) {
  Sum sums;
  reduce_vectors<kFindsLabel, kVectors>(sums, stage, slice.begin, slice.end, thread, size, label);
  if (thread < slice.ends()) {
    const int place = slice.end_at(thread);
    sums.push_one(kFindsLabel && place == label ? -INFINITY : Element<T>::widen(stage[place]));
  }
  return sums.state();
}

// Whether a row is beyond what the fused exponent can tell.
template <typename T>
__device__ __forceinline__ bool is_large(float reference) {
  return kIsHalf<T> && fabsf(reference) > kLargestFused && reference > -INFINITY;
}

// dL/dx of a row without options, by its logit.
template <typename T>
struct FusedGradient {
  float reference, factor;

  __device__ __forceinline__ explicit FusedGradient(const RowFactor<float>& row)
      : reference(FusedSum<T>::reference_of(row.high)),
        factor(row.probability * exp2_flushed(-fmaf(row.high, kLog2e, -reference))) {}
  __device__ __forceinline__ float operator()(float x) const {
    return factor * exp2_flushed(fmaf(x, kLog2e, -reference));
  }
};
template <typename T>
struct ExactGradient {
  float high, low, probability;

  __device__ __forceinline__ explicit ExactGradient(const RowFactor<float>& row)
      : high(row.high), low(row.low), probability(row.probability) {}
  __device__ __forceinline__ float operator()(float x) const {
    return probability * exp_difference<Element<T>::kExactExponent>(x, high, low);
  }
};
template <typename T>
using PlainGradient = std::conditional_t<kIsHalf<T>, FusedGradient<T>, ExactGradient<T>>;

template <typename T, typename Gradient>
__device__ __forceinline__ typename Element<T>::Raw gradient_of(const typename Element<T>::Raw& raw,
                                                                const Gradient& gradient) {
  float x[Slice<T>::kWidth];
  Element<T>::unpack(raw, x);
#pragma unroll
  for (int i = 0; i < Slice<T>::kWidth; ++i) x[i] = gradient(x[i]);
  return Element<T>::pack(x);
}

// The gradient over a slice; the label's entry is its owner's.
template <int kVectors = kSliceVectors, typename T, typename Gradient>
__device__ __forceinline__ void write_slice(const Slice<T>& slice, const T* stage, T* out, int thread, int size,
                                            const Gradient& gradient) {
  constexpr int kWidth = Slice<T>::kWidth;
  const auto write = [&](int v, const typename Element<T>::Raw& raw) {
    stream_vector(out + slice.class_of(v), gradient_of<T>(raw, gradient));
  };
  int v = slice.begin + thread;
#pragma unroll 1
  for (; v + (kVectors - 1) * size < slice.end; v += kVectors * size) {
    typename Element<T>::Raw raw[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) raw[k] = load_vector(stage + (v + k * size) * kWidth);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) write(v + k * size, raw[k]);
  }
  if (kVectors > 1 && v < slice.end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (v + k * size < slice.end) write(v + k * size, load_vector(stage + (v + k * size) * kWidth));
    }
  }
  if (thread < slice.ends()) {
    const int place = slice.end_at(thread);
    out[slice.offset + place] = Element<T>::narrow(gradient(Element<T>::widen(stage[place])));
  }
}

// A row whose logits are too large for the fused exponent, once more.
template <bool kFindsLabel, typename T>
__device__ __noinline__ RowState<float> reduce_large(const Slice<T> slice, const T* stage, int thread, int size,
                                                     int label) {
  return reduce_slice<kFindsLabel, ExactSum<T>, 1>(slice, stage, thread, size, label);
}
template <typename T>
__device__ __noinline__ void write_large(const Slice<T> slice, const T* stage, T* out, int thread, int size,
                                         const RowFactor<float> row) {
  write_slice<1>(slice, stage, out, thread, size, ExactGradient<T>(row));
}
template <typename T>
__device__ __forceinline__ void write_plain(const Slice<T>& slice, const T* stage, T* out, int thread, int size,
                                            const RowFactor<float>& row) {
  if (is_large<T>(row.high)) {
    write_large(slice, stage, out, thread, size, row);
  } else {
    write_slice(slice, stage, out, thread, size, PlainGradient<T>(row));
  }
}

template <typename T>
__device__ __forceinline__ void write_zero_slice(const Slice<T>& slice, T* out, int thread, int size) {
  constexpr int kWidth = Slice<T>::kWidth;
  constexpr float kZeros[kWidth] = {};
  for (int v = slice.begin + thread; v < slice.end; v += size) {
    stream_vector(out + slice.class_of(v), Element<T>::pack(kZeros));
  }
  for (int end = thread; end < slice.ends(); end += size) {
    out[slice.offset + slice.end_at(end)] = Element<T>::narrow(0.0f);
  }
}

}  // namespace accumloss::cuda
