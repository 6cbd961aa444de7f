// The element types: 16-byte vectors, conversion to and from the accumulator, and the exponentials in its precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../backend.h"

namespace accumloss::cuda {

constexpr int kVectorBytes = 16;

// Raw: what one 16-byte load gives. kExactExponent: the gradient keeps enough bits for the rounding of the exponent
// to be seen; bfloat16 does not.
template <typename T>
struct Element;

template <>
struct Element<float> {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  using Acc = float;
  using Raw = float4;
  static constexpr bool kExactExponent = true;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
  static __device__ __forceinline__ void unpack(const float4& raw, float (&x)[4]) {
    x[0] = raw.x, x[1] = raw.y, x[2] = raw.z, x[3] = raw.w;
  }
  static __device__ __forceinline__ float4 pack(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }
};

template <>
struct Element<double> {
  static constexpr Dtype kDtype = Dtype::kFloat64;
  using Acc = double;
  using Raw = double2;
  static constexpr bool kExactExponent = true;
  static __device__ __forceinline__ double widen(double x) { return x; }
  static __device__ __forceinline__ double narrow(double x) { return x; }
  static __device__ __forceinline__ void unpack(const double2& raw, double (&x)[2]) { x[0] = raw.x, x[1] = raw.y; }
  static __device__ __forceinline__ double2 pack(const double (&x)[2]) { return make_double2(x[0], x[1]); }
};

// Four pairs of 16-bit floats. A struct of the pair type itself, as vector loads of it are not guaranteed to be one.
template <typename Pair>
union Pairs {
  uint4 raw;
  Pair pair[4];
  __device__ __forceinline__ Pairs() : raw() {}
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  using Acc = float;
  using Raw = uint4;
  static constexpr bool kExactExponent = false;
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[8]) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of a float
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    Pairs<__nv_bfloat162> pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs.pair[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return pairs.raw;
  }
};

template <>
struct Element<__half> {
  static constexpr Dtype kDtype = Dtype::kFloat16;
  using Acc = float;
  using Raw = uint4;
  static constexpr bool kExactExponent = true;
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[8]) {
    Pairs<__half2> pairs;
    pairs.raw = raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = __half22float2(pairs.pair[i]);
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    Pairs<__half2> pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs.pair[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    return pairs.raw;
  }
};

// 2^x by one instruction, results that are no normal numbers as 0; CUDA C++ has a name for it only under -ftz=true,
// which would flush the subnormal bfloat16 that are written elsewhere.
__device__ __forceinline__ float exp2_flushed(float x) {
#if defined(ACCUMLOSS_EMULATE_CUDA)
  return emulator::flushed_exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// exp(d), d <= 0, for the sum of a row. |d| 2^-24 of relative error, which exp(d) outweighs.
__device__ __forceinline__ float exp_term(float d) { return __expf(d); }
__device__ __forceinline__ double exp_term(double d) { return exp(d); }

// exp(z - high - low). The float version within some 4 ulp even where |z - high| is large: the roundings of z - high
// (`error`) and of its product with log2(e) (`rest`) are recovered and applied to the result.
template <bool kExactExponent>
__device__ __forceinline__ float exp_difference(float z, float high, float low) {
  const float d = z - high;
  if constexpr (!kExactExponent) return __expf(d);  // the caller has taken exp(-low) into the factor
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLog2eLow = 1.92596303e-8f;
  constexpr float kLn2 = 0.693147181f;
  const float shifted = d + high;
  const float error = (z - shifted) + ((shifted - d) - high);
  const float t = d * kLog2e;
  const float rest = fmaf(d, kLog2eLow, fmaf(d, kLog2e, -t));
  const float correction = fmaf(rest, kLn2, error - low);
  const float e = exp2f(t);
  return d > -150.0f ? fmaf(e, correction, e) : e;  // below, e is 0 and d may be -inf; NaN stays NaN
}
template <bool kExactExponent>
__device__ __forceinline__ double exp_difference(double z, double high, double low) {
  return exp((z - high) - low);
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

// How the threads of a group share a row: 16-byte vectors in the middle, single elements at both ends.
template <typename T>
struct RowSpan {
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  int64_t V;
  int64_t head;  // elements before the first vector
  int64_t vectors;

  // Rows whose input and output lie differently against the 16 bytes have no vectors.
  __device__ __forceinline__ RowSpan(const T* in, const T* out, int64_t classes) : V(classes) {
    const auto in_offset = reinterpret_cast<uintptr_t>(in) % kVectorBytes;
    const auto out_offset = reinterpret_cast<uintptr_t>(out) % kVectorBytes;
    head = static_cast<int64_t>((kVectorBytes - in_offset) % kVectorBytes / sizeof(T));
    vectors = V < head || in_offset != out_offset ? 0 : (V - head) / kWidth;
  }

  __device__ __forceinline__ int64_t vector_index(int64_t v) const { return head + v * kWidth; }
  __device__ __forceinline__ int64_t scalars() const { return V - vectors * kWidth; }
  __device__ __forceinline__ int64_t scalar_index(int64_t s) const {
    return vectors == 0 || s < head ? s : s + vectors * kWidth;
  }

  // Position of class y in the vector that starts at class j, or -1.
  static __device__ __forceinline__ int label_position(int64_t y, int64_t j) {
    const uint64_t position = static_cast<uint64_t>(y - j);
    return position < static_cast<uint64_t>(kWidth) ? static_cast<int>(position) : -1;
  }
};

template <typename T>
__device__ __forceinline__ typename Element<T>::Raw load_vector(const T* x) {
  return *reinterpret_cast<const typename Element<T>::Raw*>(x);
}

// From global memory, past the first-level cache: it is read again when that has long given it away. An intrinsic, as
// the compiler does not see that the address is global.
template <typename T>
__device__ __forceinline__ typename Element<T>::Raw load_far(const T* x) {
  return __ldcg(reinterpret_cast<const typename Element<T>::Raw*>(x));
}

// From global memory, where it is not read again: the L2 may give its place away.
template <typename T>
__device__ __forceinline__ typename Element<T>::Raw load_last(const T* x) {
  return __ldcs(reinterpret_cast<const typename Element<T>::Raw*>(x));
}

// Into shared memory.
template <typename T>
__device__ __forceinline__ void store_vector(T* x, const typename Element<T>::Raw& raw) {
  *reinterpret_cast<typename Element<T>::Raw*>(x) = raw;
}

// Into global memory. An intrinsic, as nvcc splits a plain assignment of a vector into four stores of 4 bytes where it
// has taken the address apart. Streaming: what is written here is not read again by the kernel.
template <typename T>
__device__ __forceinline__ void stream_vector(T* x, const typename Element<T>::Raw& raw) {
  __stcs(reinterpret_cast<typename Element<T>::Raw*>(x), raw);
}

}  // namespace accumloss::cuda
