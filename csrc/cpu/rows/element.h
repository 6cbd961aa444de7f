// The element types of the logits: how they are widened to the type of the computation, and rounded.
#pragma once

#include "vector.h"

namespace accumloss {
namespace cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

ACCUMLOSS_INLINE FloatUnsigned load_bits(const void* x) {
  const FloatHalf half = *reinterpret_cast<const Vectors<float>::UnalignedHalf*>(x);
  return __builtin_convertvector(half, FloatUnsigned);
}
ACCUMLOSS_INLINE void store_bits(FloatUnsigned bits, void* x) {
  *reinterpret_cast<Vectors<float>::UnalignedHalf*>(x) = __builtin_convertvector(bits, FloatHalf);
}

ACCUMLOSS_INLINE FloatReal load(const BFloat16* x) { return reinterpret_cast<FloatReal>(load_bits(x) << 16); }
// Round to nearest, ties to even. A NaN keeps its upper half, and that is a NaN too: the NaNs that get here are quiet.
ACCUMLOSS_INLINE void store(FloatReal v, BFloat16* x) {
  const FloatUnsigned bits = reinterpret_cast<FloatUnsigned>(v);
  const FloatUnsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  store_bits((v == v ? rounded : bits) >> 16, x);
}

ACCUMLOSS_INLINE FloatUnsigned
round_to_bfloat16(FloatReal v) {  // in the upper half; of NaNs, those that the machine makes
  const FloatUnsigned bits = reinterpret_cast<FloatUnsigned>(v);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

#if defined(__F16C__)
#if defined(__AVX512F__)
ACCUMLOSS_INLINE FloatReal load(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
ACCUMLOSS_INLINE void store(FloatReal v, Float16* x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
ACCUMLOSS_INLINE FloatReal load(const Float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
ACCUMLOSS_INLINE void store(FloatReal v, Float16* x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#else
// Without conversion instructions: a half is a float whose exponent is 112 too small, which one multiplication mends,
// subnormals included; infinity and NaN get the largest exponent.
ACCUMLOSS_INLINE FloatReal load(const Float16* x) {
  const FloatUnsigned bits = load_bits(x);
  const FloatUnsigned magnitude = (bits & 0x7fffu) << 13;
  const FloatReal finite = reinterpret_cast<FloatReal>(magnitude) * 0x1p112f;
  const FloatUnsigned special = magnitude | 0x7f800000u;
  const FloatUnsigned value = magnitude >= (0x7c00u << 13) ? special : reinterpret_cast<FloatUnsigned>(finite);
  return reinterpret_cast<FloatReal>(value | ((bits & 0x8000u) << 16));
}
ACCUMLOSS_INLINE void store(FloatReal v, Float16* x) {
  const FloatUnsigned bits = reinterpret_cast<FloatUnsigned>(v);
  const FloatUnsigned magnitude = bits & 0x7fffffffu;
  // below 2^-14 the addition of 0.5 aligns the bits of a subnormal half and rounds them
  const FloatReal half = reinterpret_cast<FloatReal>(magnitude) + 0.5f;
  const FloatUnsigned subnormal = reinterpret_cast<FloatUnsigned>(half) - 0x3f000000u;
  const FloatUnsigned normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const FloatUnsigned infinity = FloatUnsigned{} + 0x7c00u;
  FloatUnsigned value = magnitude < (113u << 23) ? subnormal : normal;
  value = magnitude >= 0x477ff000u ? infinity : value;  // 65520 and more round to infinity
  value = v == v ? value : FloatUnsigned{} + 0x7e00u;
  store_bits(value | ((bits >> 16) & 0x8000u), x);
}
#endif

// v to x past the caches, x at a multiple of the vector's size; the machine's order of stores does not cover it.
ACCUMLOSS_INLINE void stream_bytes(FloatReal v, void* x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(x), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(x), v);
#else
  *static_cast<FloatReal*>(x) = v;
#endif
}

constexpr BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
constexpr Float16 negative_infinity(Float16) { return {0xfc00}; }
template <typename Acc>
constexpr Acc negative_infinity(Acc) {
  return -std::numeric_limits<Acc>::infinity();
}

// kLanes consecutive elements as vectors, in the order in which they are cheapest to take apart and to put together:
// that of memory, but for bf16 the elements of even index before those of odd index.
template <typename T>
struct Lanes {
  using Acc = typename AccOf<T>::type;
  using Real = typename Vectors<Acc>::Real;
  static constexpr int kWidth = Vectors<Acc>::kWidth;
  static constexpr int kVectors = kLanes / kWidth;

  static ACCUMLOSS_INLINE void load(const T* x, Real* v) {
    for (int k = 0; k < kVectors; ++k) v[k] = cpu::load(x + k * kWidth);
  }
  static ACCUMLOSS_INLINE void store(const Real* v, T* x) {
    for (int k = 0; k < kVectors; ++k) cpu::store(v[k], x + k * kWidth);
  }
  // Past the caches, x at a line.
  static ACCUMLOSS_INLINE void stream(const Real* v, T* x) {
    alignas(64) T copy[kLanes];
    store(v, copy);
    for (size_t i = 0; i < sizeof copy; i += kVectorBytes) {
      FloatReal bytes;
      std::memcpy(&bytes, reinterpret_cast<const char*>(copy) + i, sizeof bytes);
      stream_bytes(bytes, reinterpret_cast<char*>(x) + i);
    }
  }
};

// A pair of elements is one word: the one of even index its lower half.
template <>
struct Lanes<BFloat16> {
  using Acc = float;
  using Real = FloatReal;
  static constexpr int kWidth = Vectors<float>::kWidth;
  static constexpr int kVectors = kLanes / kWidth;
  typedef uint32_t UnalignedPairs __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

  static ACCUMLOSS_INLINE void load(const BFloat16* x, Real* v) {
    for (int k = 0; k < kVectors / 2; ++k) {
      const FloatUnsigned pairs = *reinterpret_cast<const UnalignedPairs*>(x + 2 * k * kWidth);
      v[k] = reinterpret_cast<Real>(pairs << 16);
      v[k + kVectors / 2] = reinterpret_cast<Real>(pairs & 0xffff0000u);
    }
  }
  // Round to nearest, ties to even. A NaN stays one: those that get here have the bits of a bf16, or of the machine's
  // own.
  static ACCUMLOSS_INLINE void store(const Real* v, BFloat16* x) {
    for (int k = 0; k < kVectors / 2; ++k) {
      const FloatUnsigned low = round_to_bfloat16(v[k]), high = round_to_bfloat16(v[k + kVectors / 2]);
      *reinterpret_cast<UnalignedPairs*>(x + 2 * k * kWidth) = (low >> 16) | (high & 0xffff0000u);
    }
  }
  static ACCUMLOSS_INLINE void stream(const Real* v, BFloat16* x) {
    for (int k = 0; k < kVectors / 2; ++k) {
      const FloatUnsigned low = round_to_bfloat16(v[k]), high = round_to_bfloat16(v[k + kVectors / 2]);
      stream_bytes(reinterpret_cast<Real>((low >> 16) | (high & 0xffff0000u)), x + 2 * k * kWidth);
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace accumloss
