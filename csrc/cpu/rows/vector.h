// GCC's vector types, which carry the arithmetic; a few instructions know the machine. Sums run over kLanes partial
// sums in an order that does not depend on the width of a vector, so AVX2 and AVX-512 give the same bits.
//
// The headers of this folder are compiled once for each instruction set (table.cpp). All that they define is forced
// inline or has internal linkage: no function that was compiled for one can be linked into another.
#pragma once

#include <cstring>
#include <type_traits>

#include "table.h"

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace accumloss {
namespace cpu {
namespace {

#define ACCUMLOSS_INLINE inline __attribute__((always_inline))
// What works on a block, or on a group of rows, is a function of its own: a call costs it nothing, a copy in each
// caller much of the time of a build.
#define ACCUMLOSS_NOINLINE __attribute__((noinline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Acc>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Real __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint16_t UnalignedHalf __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  static constexpr int kWidth = kVectorBytes / 4;
  static constexpr int kMantissaBits = 23;
  static constexpr float kLowest = -87.3365402f;  // log(2^-126): below, exp is zero
  static constexpr float kMagic = 12583039.f;     // 1.5 * 2^23 + 127: adding it rounds to an integer, biased
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLn2 = 0.693147182f;  // 2e-9 off, 0.05 |x| units of exp(x)
};
template <>
struct Vectors<double> {
  typedef double Real __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  static constexpr int kWidth = kVectorBytes / 8;
  static constexpr int kMantissaBits = 52;
  static constexpr double kLowest = -708.396418532264;  // log(2^-1022)
  static constexpr double kMagic = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real broadcast(Acc value) {
  return value - typename Vectors<Acc>::Real{};
}

using FloatReal = Vectors<float>::Real;
using FloatUnsigned = Vectors<float>::Unsigned;
using FloatHalf = Vectors<float>::Half;

ACCUMLOSS_INLINE FloatReal load(const float* x) { return *reinterpret_cast<const Vectors<float>::Unaligned*>(x); }
ACCUMLOSS_INLINE Vectors<double>::Real load(const double* x) {
  return *reinterpret_cast<const Vectors<double>::Unaligned*>(x);
}
ACCUMLOSS_INLINE void store(FloatReal v, float* x) { *reinterpret_cast<Vectors<float>::Unaligned*>(x) = v; }
ACCUMLOSS_INLINE void store(Vectors<double>::Real v, double* x) {
  *reinterpret_cast<Vectors<double>::Unaligned*>(x) = v;
}

// a > b ? a : b, which GCC turns into a comparison and a blend
ACCUMLOSS_INLINE Vectors<float>::Real maximum(Vectors<float>::Real a, Vectors<float>::Real b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vectors<float>::Real>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vectors<float>::Real>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
ACCUMLOSS_INLINE Vectors<double>::Real maximum(Vectors<double>::Real a, Vectors<double>::Real b) {
  return a > b ? a : b;
}

// Whether any lane of a is above b.
ACCUMLOSS_INLINE bool any_greater(Vectors<float>::Real a, Vectors<float>::Real b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < Vectors<float>::kWidth; ++i) any |= a[i] > b[i];
  return any;
#endif
}
ACCUMLOSS_INLINE bool any_greater(Vectors<double>::Real a, Vectors<double>::Real b) {
  bool any = false;
  for (int i = 0; i < Vectors<double>::kWidth; ++i) any |= a[i] > b[i];
  return any;
}

template <typename Acc, int kVectors>
ACCUMLOSS_INLINE bool any_above(const typename Vectors<Acc>::Real* v, Acc limit) {
  typename Vectors<Acc>::Real max = v[0];
  for (int k = 1; k < kVectors; ++k) max = maximum(v[k], max);
  return any_greater(max, broadcast(limit));
}

template <typename Acc, int kSize>
struct VectorOf {
  typedef Acc Type __attribute__((vector_size(kSize * sizeof(Acc))));
};

// The lanes of a vector, combined in halves until one is left.
template <typename Acc, int kSize, typename Combine>
ACCUMLOSS_INLINE Acc fold(const typename VectorOf<Acc, kSize>::Type& v, const Combine& combine) {
  if constexpr (kSize == 2) {
    return combine(v[0], v[1]);
  } else {
    typename VectorOf<Acc, kSize / 2>::Type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<Acc, kSize / 2>(combine(low, high), combine);
  }
}

struct Add {
  template <typename V>
  ACCUMLOSS_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <typename V>
  ACCUMLOSS_INLINE V operator()(V a, V b) const {
    if constexpr (std::is_same<V, FloatReal>::value)
      return maximum(a, b);
    else
      return a > b ? a : b;
  }
};

// kLanes lanes, halved until one vector is left.
template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real sum_vectors(const typename Vectors<Acc>::Real* vectors) {
  constexpr int kVectors = kLanes / Vectors<Acc>::kWidth;
  typename Vectors<Acc>::Real v[kVectors];
  for (int k = 0; k < kVectors; ++k) v[k] = vectors[k];
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  return v[0];
}

// The sum of kLanes lanes, halved until one is left: an order that no vector width changes.
template <typename Acc>
ACCUMLOSS_INLINE Acc sum_lanes(const typename Vectors<Acc>::Real* vectors) {
  return fold<Acc, Vectors<Acc>::kWidth>(sum_vectors<Acc>(vectors), Add());
}

template <typename Acc, int kVectors = kLanes / Vectors<Acc>::kWidth>
ACCUMLOSS_INLINE Acc max_lanes(const typename Vectors<Acc>::Real* vectors) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  typename Vectors<Acc>::Real max = vectors[0];
  for (int k = 1; k < kVectors; ++k) max = maximum(vectors[k], max);
  return fold<Acc, kWidth>(max, Larger());
}

// out[r] = what fold() makes of the kWidth lanes of row r, r < count, a multiple of kWidth: two rows to a vector in
// each step, so that it takes a quarter of the instructions.
template <typename Combine>
ACCUMLOSS_NOINLINE void fold_rows(const float* lanes, int64_t count, float* out, const Combine& combine) {
  constexpr int kWidth = Vectors<float>::kWidth;
#if defined(__AVX512F__)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t r = 0; r < count; r += kWidth, lanes += kWidth * kWidth) {
    FloatReal v[kWidth];
    for (int i = 0; i < 8; ++i) {
      const FloatReal a = load(lanes + 2 * i * kWidth), b = load(lanes + (2 * i + 1) * kWidth);
      v[i] = combine(FloatReal(_mm512_shuffle_f32x4(a, b, 0x44)), FloatReal(_mm512_shuffle_f32x4(a, b, 0xee)));
    }
    for (int i = 0; i < 4; ++i)
      v[i] = combine(FloatReal(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88)),
                     FloatReal(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd)));
    for (int i = 0; i < 2; ++i)
      v[i] = combine(FloatReal(_mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44)),
                     FloatReal(_mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0xee)));
    v[0] = combine(FloatReal(_mm512_shuffle_ps(v[0], v[1], 0x88)), FloatReal(_mm512_shuffle_ps(v[0], v[1], 0xdd)));
    store(FloatReal(_mm512_permutexvar_ps(order, v[0])), out + r);
  }
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t r = 0; r < count; r += kWidth, lanes += kWidth * kWidth) {
    FloatReal v[kWidth];
    for (int i = 0; i < 4; ++i) {
      const FloatReal a = load(lanes + 2 * i * kWidth), b = load(lanes + (2 * i + 1) * kWidth);
      v[i] = combine(FloatReal(_mm256_permute2f128_ps(a, b, 0x20)), FloatReal(_mm256_permute2f128_ps(a, b, 0x31)));
    }
    for (int i = 0; i < 2; ++i)
      v[i] = combine(FloatReal(_mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44)),
                     FloatReal(_mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0xee)));
    v[0] = combine(FloatReal(_mm256_shuffle_ps(v[0], v[1], 0x88)), FloatReal(_mm256_shuffle_ps(v[0], v[1], 0xdd)));
    store(FloatReal(_mm256_permutevar8x32_ps(v[0], order)), out + r);
  }
#else
  for (int64_t r = 0; r < count; ++r) out[r] = fold<float, kWidth>(load(lanes + r * kWidth), combine);
#endif
}

}  // namespace
}  // namespace cpu
}  // namespace accumloss
