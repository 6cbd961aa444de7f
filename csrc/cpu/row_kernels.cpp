// The row kernels on CPU: one read of the logits gives the RowState, a second pass over the row (or over its
// exponentials, kept in a scratch row) the gradient.
//
// This file is compiled once for each instruction set, with ACCUMLOSS_ISA naming it. GCC's vector types carry the
// arithmetic; the half-precision conversions and a few masked instructions know the machine. Sums run over kLanes
// partial sums in an order that does not depend on the vector width, so AVX2 and AVX-512 give the same bits.
#include "row_kernels.h"

#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace accumloss {
namespace cpu {
namespace {

#define ACCUMLOSS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Vectors ------------------------------------------------------------------------------------------------------------

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

// r -> p = (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, of kCount vectors
template <int kCount>
ACCUMLOSS_INLINE void exp_tails(const Vectors<float>::Real* r, Vectors<float>::Real* p) {  // minimax, 3.3e-9 of exp(r)
  for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.00138131449136f + 0.00836941882809f;
  for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.0416684567812f;
  for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.166665147915f;
  for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.499999930507f;
}
ACCUMLOSS_INLINE Vectors<float>::Real exp_tail(Vectors<float>::Real r) {
  Vectors<float>::Real p;
  exp_tails<1>(&r, &p);
  return p;
}
ACCUMLOSS_INLINE Vectors<double>::Real exp_tail(Vectors<double>::Real r) {  // Taylor, 4e-18
  Vectors<double>::Real p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  return p * r + 0.5;
}

template <int kCount>
ACCUMLOSS_INLINE void exp_tails(const Vectors<double>::Real* r, Vectors<double>::Real* p) {
  for (int k = 0; k < kCount; ++k) p[k] = exp_tail(r[k]);
}

// x - n log(2)
ACCUMLOSS_INLINE Vectors<double>::Real remainder(Vectors<double>::Real x, Vectors<double>::Real n) {
  return (x - n * Vectors<double>::kLn2High) - n * Vectors<double>::kLn2Low;
}
ACCUMLOSS_INLINE Vectors<float>::Real remainder(Vectors<float>::Real x, Vectors<float>::Real n) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return x - n * Vectors<float>::kLn2;  // one rounding
#else
  return (x - n * Vectors<float>::kLn2High) - n * Vectors<float>::kLn2Low;
#endif
}

// exp(x) where zero is not set, for x in [kLowest, 88] and NaN.
template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real exp_or_zero(typename Vectors<Acc>::Real x,
                                                         typename Vectors<Acc>::Int zero) {
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  using Int = typename V::Int;
  const Real shifted = x * Acc(1.4426950408889634) + V::kMagic;
  const Real n = shifted - V::kMagic;
  const Real r = remainder(x, n);
  const Real e = (exp_tail(r) * r + Acc(1)) * r + Acc(1);
  const Real power = reinterpret_cast<Real>(reinterpret_cast<Int>(shifted) << V::kMantissaBits);  // 2^n
  return zero ? Real{} : e * power;
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

// e = exp(z - reference) of kCount vectors, d = z - reference; for fp32 logits with what that subtraction rounds away,
// which is up to 4e-6. Side by side in each step: what waits for a result waits outside of the core's schedulers.
template <typename T, typename Acc, int kCount>
ACCUMLOSS_INLINE void exps_of_differences(const typename Vectors<Acc>::Real* z, typename Vectors<Acc>::Real reference,
                                          typename Vectors<Acc>::Real* d, typename Vectors<Acc>::Real* e) {
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  using Int = typename V::Int;
  constexpr bool kHasLow = std::is_same<T, float>::value;
  Real low[kCount], shifted[kCount], n[kCount], r[kCount];
  for (int k = 0; k < kCount; ++k) d[k] = z[k] - reference;
  if (kHasLow) {
    Real back[kCount];
    for (int k = 0; k < kCount; ++k) back[k] = d[k] - z[k];
    for (int k = 0; k < kCount; ++k) low[k] = (z[k] - (d[k] - back[k])) - (reference + back[k]);
  }
  for (int k = 0; k < kCount; ++k) shifted[k] = d[k] * Acc(1.4426950408889634) + V::kMagic;
  for (int k = 0; k < kCount; ++k) n[k] = shifted[k] - V::kMagic;
  for (int k = 0; k < kCount; ++k) r[k] = remainder(d[k], n[k]);
  if (kHasLow)
    for (int k = 0; k < kCount; ++k) r[k] = r[k] + low[k];
  exp_tails<kCount>(r, e);
  for (int k = 0; k < kCount; ++k) e[k] = e[k] * r[k] + Acc(1);
  for (int k = 0; k < kCount; ++k) e[k] = e[k] * r[k] + Acc(1);
  for (int k = 0; k < kCount; ++k) {
    const Real power = reinterpret_cast<Real>(reinterpret_cast<Int>(shifted[k]) << V::kMantissaBits);  // 2^n
    e[k] = d[k] < V::kLowest ? Real{} : e[k] * power;
  }
}

// exp(z - origin) of the logits of a row, z at most some 80 above the origin. The origin is what the caller asked for,
// give or take a rounding.
template <typename T>
struct ExpFrom {
  using Acc = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
  using Real = typename Vectors<Acc>::Real;
  static constexpr double kUnit = 1;            // of u in z
  static constexpr bool kClampsAlways = false;  // whether u exp() is 0 at -inf also where exp() is not asked to clamp
  const Acc origin_;

  ACCUMLOSS_INLINE explicit ExpFrom(Acc origin) : origin_(origin) {}
  ACCUMLOSS_INLINE double origin() const { return origin_; }
  // u = (z - origin) / kUnit; where kClamps, raised to where the exponential is zero, so that u exp() is 0 at -inf
  template <bool kClamps, int kCount>
  ACCUMLOSS_INLINE void exps(const Real* z, Real* u, Real* e) const {
    exps_of_differences<T, Acc, kCount>(z, broadcast(origin_), u, e);
    for (int k = 0; kClamps && k < kCount; ++k)
      u[k] = u[k] < Vectors<Acc>::kLowest ? broadcast<Acc>(Vectors<Acc>::kLowest) : u[k];
  }
  template <bool kClamps>
  ACCUMLOSS_INLINE Real exp(Real z, Real* u) const {
    Real e;
    exps<kClamps, 1>(&z, u, &e);
    return e;
  }
};

// bf16 logits, whose gradient keeps 8 bits: 2^(2u) with u = z log2(e) / 2 + offset in one rounding, where the machine
// has such. The half keeps the product and the offset of the largest bf16 finite. The exponential is within 1e-7, and
// 7e-8 |z - origin|.
template <>
struct ExpFrom<BFloat16> {
  using Acc = float;
  using Real = Vectors<float>::Real;
  using Int = Vectors<float>::Int;
  static constexpr float kScale = 0.72134752f;
  static constexpr double kUnit = 1.0 / static_cast<double>(kScale);
  static constexpr bool kClampsAlways = true;
  static constexpr float kLowest = -63.5f;     // the exponent field of 2^-127 is that of zero: u is raised to it
  static constexpr float kMagic = 6291519.5f;  // 1.5 * 2^22 + 127 / 2: adding it rounds to halves, biased
  // From here on two bf16 are equal or 2^12 apart, and the rounding of the offset would not be small any more: the
  // origin is a bf16 then, and a difference from it 0 or large in any unit.
  static constexpr float kFar = 0x1p20f;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr bool kFused = true;
#else
  static constexpr bool kFused = false;
#endif
  float scale_, offset_;

  ACCUMLOSS_INLINE explicit ExpFrom(float origin) : scale_(kScale) {
    if (!(std::fabs(origin) < kFar)) {
      scale_ = 1;
      uint32_t bits;
      std::memcpy(&bits, &origin, sizeof bits);
      bits = (bits + 0x8000u) & 0xffff0000u;
      std::memcpy(&origin, &bits, sizeof bits);
    }
    offset_ = kFused ? -origin * scale_ : -origin;
  }
  ACCUMLOSS_INLINE double origin() const {
    return -static_cast<double>(offset_) / (kFused ? static_cast<double>(scale_) : 1.0);
  }
  template <bool kClamps>
  ACCUMLOSS_INLINE Real exp(Real z, Real* u) const {
    Real e;
    exps<kClamps, 1>(&z, u, &e);
    return e;
  }
  // kCount of them, side by side in each step: what waits for a result waits outside of the core's schedulers.
  template <bool kClamps, int kCount>
  ACCUMLOSS_INLINE void exps(const Real* z, Real* u, Real* e) const {
    Real shifted[kCount], f[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) u[k] = kFused ? z[k] * scale_ + offset_ : (z[k] + offset_) * scale_;
    for (int k = 0; k < kCount; ++k) u[k] = maximum(broadcast<float>(kLowest), u[k]);  // a NaN stays
    for (int k = 0; k < kCount; ++k) shifted[k] = u[k] + kMagic;
    for (int k = 0; k < kCount; ++k) f[k] = shifted[k] - kMagic;
    for (int k = 0; k < kCount; ++k) f[k] = u[k] - f[k];
    for (int k = 0; k < kCount; ++k) p[k] = f[k] * 0.0424471274018f + 0.154744207859f;  // minimax on [-1/4, 1/4], 9e-8
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 0.444058686495f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 0.960889697075f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 1.3862940073f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 1.0f;
    for (int k = 0; k < kCount; ++k)
      e[k] = p[k] * reinterpret_cast<Real>(reinterpret_cast<Int>(shifted[k]) << Vectors<float>::kMantissaBits);
  }
};

// exp(x) for x <= 0 (to some 80 above it), exactly 0 where it would be subnormal, NaN for NaN. x is left clamped, so
// that x * exp(x) is 0 at -inf.
template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real exp_clamped(typename Vectors<Acc>::Real& x) {
  using V = Vectors<Acc>;
  using Int = typename V::Int;
  const Int zero = x < V::kLowest;
  x = zero ? broadcast<Acc>(V::kLowest) : x;
  return exp_or_zero<Acc>(x, zero);
}

// log1p(x) for x >= 0, NaN for NaN and infinity: log(1 + x) = k log(2) + 2 atanh(s), and what 1 + x rounded away.
ACCUMLOSS_INLINE Vectors<float>::Real vector_log1p(Vectors<float>::Real x) {
  using V = Vectors<float>;
  using Real = V::Real;
  using Int = V::Int;
  const Real u = x + 1.0f;
  const Real lost = x - (u - 1.0f);
  // u = 2^k m, m in [sqrt(1/2), sqrt(2)): k is the exponent of u times sqrt(2)
  const Int k = (reinterpret_cast<Int>(u * 1.41421356f) >> V::kMantissaBits) - 127;
  const Real m = reinterpret_cast<Real>(reinterpret_cast<Int>(u) - (k << V::kMantissaBits));
  const Real rest = lost * reinterpret_cast<Real>((127 - k) << V::kMantissaBits);  // lost / 2^k, k small
  const Real f = (m - 1.0f) + rest;
  const Real s = f / (f + 2.0f);
  const Real q = s * s;
  // 2 atanh(s) = 2s + 2s (q/3 + q^2/5 + ...) and 2s = f - s f
  Real p = q * (2.0f / 9) + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  const Real k_real = __builtin_convertvector(k, Real);
  const Real low = k_real * V::kLn2Low + s * (p * q - f);
  return (k_real * V::kLn2High + f) + (low + (x - x));
}

// tanh(u) / u - 1 over u^2, as a polynomial in u^2, for |u| < 0.625
ACCUMLOSS_INLINE Vectors<float>::Real tanh_tail(Vectors<float>::Real s) {  // minimax, 4.4e-9 of tanh(u)
  Vectors<float>::Real p = s * -0.00570498712969f + 0.0206390873609f;
  p = p * s - 0.0537397151195f;
  p = p * s + 0.133314421986f;
  return p * s - 0.33333281942f;
}
ACCUMLOSS_INLINE Vectors<double>::Real tanh_tail(Vectors<double>::Real s) {
  Vectors<double>::Real result = {};
  for (int i = 0; i < Vectors<double>::kWidth; ++i) {
    const double u = std::sqrt(s[i]);
    result[i] = s[i] > 0 ? (std::tanh(u) / u - 1.0) / s[i] : -1.0 / 3.0;
  }
  return result;
}

template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real vector_tanh(typename Vectors<Acc>::Real u) {
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  const Real magnitude = u < 0 ? -u : u;
  Real twice = magnitude * Acc(-2);
  const Real e = exp_clamped<Acc>(twice);
  const Real large = (Acc(1) - e) / (Acc(1) + e);
  const Real s = u * u;
  const Real small = tanh_tail(s) * s * u + u;
  return magnitude < Acc(0.625) ? small : (u < 0 ? -large : large);
}

// Loads and stores
// -----------------------------------------------------------------------------------------------------

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

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

// Groups -------------------------------------------------------------------------------------------------------------

// kLanes consecutive elements as vectors, in the order in which they are cheapest to take apart and to put together:
// that of memory, but for bf16 the elements of even index before those of odd index.
template <typename T>
struct Group {
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
};

// A pair of elements is one word: the one of even index its lower half.
template <>
struct Group<BFloat16> {
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
};

// Blocks -------------------------------------------------------------------------------------------------------------

ACCUMLOSS_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The group that lies so many bytes ahead.
template <typename T>
ACCUMLOSS_INLINE void prefetch(const T* group, int64_t ahead) {
  const auto from = reinterpret_cast<uintptr_t>(group) + static_cast<uintptr_t>(ahead);  // no pointer may say so
  for (size_t line = 0; line < sizeof(T) * kLanes; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(from + line));
}

// buffer[i] = x[i], i < n; entries up to the next multiple of kLanes are overwritten with anything finite.
template <typename T, typename Acc>
ACCUMLOSS_INLINE void load_block(const T* x, int64_t n, Acc* buffer, int64_t ahead = kPrefetchBytes) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(x + i, ahead);
    for (int k = 0; k < kLanes; k += kWidth) store(load(x + i + k), buffer + i + k);
  }
  if (i < n) {
    T tail[kLanes] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(n - i) * sizeof(T));
    for (int k = 0; k < kLanes; k += kWidth) store(load(tail + k), buffer + i + k);
  }
}

template <typename T, typename Acc>
ACCUMLOSS_INLINE void store_block(const Acc* buffer, int64_t n, T* x) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; k += kWidth) store(load(buffer + i + k), x + i + k);
  if (i < n) {
    T tail[kLanes];
    for (int k = 0; k < kLanes; k += kWidth) store(load(buffer + i + k), tail + k);
    std::memcpy(x + i, tail, static_cast<size_t>(n - i) * sizeof(T));
  }
}

// buffer = z(buffer)
template <typename Acc>
void transform_block(Acc* buffer, int64_t n, const Transform<Acc>& transform) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  for (int64_t i = 0; i < n; i += kWidth) {
    const auto x = load(buffer + i);
    const auto z =
        transform.softcap > 0 ? vector_tanh<Acc>(x * transform.inner) * transform.softcap : x * transform.logit_scale;
    store(z, buffer + i);
  }
}

// grad *= dz/dx (logits x, before the transform); see Transform::slope
template <typename Acc>
void multiply_by_slope(const Acc* x, int64_t n, const Transform<Acc>& transform, Acc* grad) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  using Real = typename Vectors<Acc>::Real;
  for (int64_t i = 0; i < n; i += kWidth) {
    Real slope = broadcast<Acc>(transform.logit_scale);
    if (transform.softcap > 0) {
      const Real u = load(x + i) * transform.inner;
      Real twice = (u < 0 ? u : -u) * Acc(2);
      const Real e = exp_clamped<Acc>(twice);
      slope = slope * (e * Acc(4) / ((e + Acc(1)) * (e + Acc(1))));
    }
    store(load(grad + i) * slope, grad + i);
  }
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

template <typename Acc>
ACCUMLOSS_INLINE Acc max_lanes(const typename Vectors<Acc>::Real* vectors) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  typename Vectors<Acc>::Real max = vectors[0];
  for (int k = 1; k < kLanes / kWidth; ++k) max = maximum(vectors[k], max);
  return fold<Acc, kWidth>(max, Larger());
}

// out[r] = what fold() makes of the kWidth lanes of row r, r < count, a multiple of kWidth: two rows to a vector in
// each step, so that it takes a quarter of the instructions.
template <typename Combine>
ACCUMLOSS_INLINE void fold_rows(const float* lanes, int64_t count, float* out, const Combine& combine) {
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

template <typename Acc>
ACCUMLOSS_INLINE Acc max_block(const Acc* z, int64_t padded) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  constexpr int kVectors = kLanes / kWidth;
  typename Vectors<Acc>::Real max[kVectors];
  for (int k = 0; k < kVectors; ++k) max[k] = load(z + k * kWidth);
  for (int64_t i = kLanes; i < padded; i += kLanes)
    for (int k = 0; k < kVectors; ++k) {
      const auto v = load(z + i + k * kWidth);
      max[k] = maximum(v, max[k]);
    }
  return max_lanes<Acc>(max);
}

// sum_j exp(z_j - reference), and sum_j exp(z_j - reference) (z_j - reference) where kWeighted.
template <bool kWeighted, bool kStore, typename Acc>
ACCUMLOSS_INLINE Acc sum_exps(const Acc* z, int64_t padded, int64_t n, Acc reference, Acc* exps, Acc* weighted) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  constexpr int kVectors = kLanes / kWidth;
  using Real = typename Vectors<Acc>::Real;
  Real sums[kVectors] = {};
  Real products[kVectors] = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    Real e[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      Real x = load(z + i + k * kWidth) - reference;
      e[k] = exp_clamped<Acc>(x);
      sums[k] += e[k];
      if (kWeighted) products[k] += e[k] * x;
    }
    if (kStore) {
      if (i + kLanes <= n) {
        for (int k = 0; k < kVectors; ++k) store(e[k], exps + i + k * kWidth);
      } else {
        std::memcpy(exps + i, e, static_cast<size_t>(n - i) * sizeof(Acc));
      }
    }
  }
  if (kWeighted) *weighted = sum_lanes<Acc>(products);
  return sum_lanes<Acc>(sums);
}

// sum_j w_j (z_j - reference), j < n
template <typename Acc>
double sum_linear(const Acc* z, const Acc* weight, int64_t n, double reference) {
  const Acc origin = static_cast<Acc>(reference);
  Acc lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    for (int k = 0; k < count; ++k) lanes[k] += (z[i + k] - origin) * (weight != nullptr ? weight[i + k] : Acc(1));
  }
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// The same in double, for a block whose sum is beyond Acc, as that of masked classes is: of z, or of x times scale
// where that is z. skipped: the label's position, or -1.
template <typename T, typename Acc>
__attribute__((noinline)) double sum_linear_wide(const T* x, double scale, const Acc* z, const Acc* weight, int64_t n,
                                                 int64_t skipped, double reference) {
  alignas(64) Acc buffer[kBlock];
  if (x != nullptr) load_block(x, n, buffer);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = x != nullptr ? scale * static_cast<double>(buffer[i]) : static_cast<double>(z[i]);
    if (i != skipped) sum += (value - reference) * (weight != nullptr ? static_cast<double>(weight[i]) : 1.0);
  }
  return sum;
}

// Plain rows: one loop loads, compares, exponentiates and sums; the exponentials stay in the lanes of Group.

constexpr BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
constexpr Float16 negative_infinity(Float16) { return {0xfc00}; }
template <typename Acc>
constexpr Acc negative_infinity(Acc) {
  return -std::numeric_limits<Acc>::infinity();
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

template <typename Acc>
ACCUMLOSS_INLINE bool any_above(const typename Vectors<Acc>::Real* v, Acc limit) {
  typename Vectors<Acc>::Real max = v[0];
  for (int k = 1; k < kLanes / Vectors<Acc>::kWidth; ++k) max = maximum(v[k], max);
  return any_greater(max, broadcast(limit));
}

// How many groups go through a loop at once: their chains of dependent instructions side by side, in 32 registers.
template <typename T>
constexpr int kGroupsAtOnce = kVectorBytes == 64 && std::is_same<T, BFloat16>::value ? 2 : 1;
// Logits whose exponentials are summed up in float, and have one reference. bf16 keeps 8 bits: two blocks.
template <typename T>
constexpr int64_t kSpan = std::is_same<T, BFloat16>::value ? 2 * kBlock : kBlock;
template <int kCount>
using Count = std::integral_constant<int, kCount>;

// copy = the classes [begin, begin + kLanes), with -inf for the label and past the end.
template <typename T>
__attribute__((noinline)) void copy_masked(const RowSegment& row, int64_t begin, T* copy) {
  const int64_t n = row.end - begin < kLanes ? row.end - begin : kLanes;
  for (int64_t i = n; i < kLanes; ++i) copy[i] = negative_infinity(T{});
  std::memcpy(copy, static_cast<const T*>(row.x) + begin, static_cast<size_t>(n) * sizeof(T));
  if (row.target >= begin && row.target < begin + n) copy[row.target - begin] = negative_infinity(T{});
}

template <bool kWeighted, bool kStore, typename T>
void push_plain(const RowSegment& row, RowState<double>* state, typename AccOf<T>::type* exps,
                typename AccOf<T>::type* references) {
  using Acc = typename AccOf<T>::type;
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  constexpr int kVectors = Group<T>::kVectors;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  constexpr int kStep = kGroupsAtOnce<T>;
  constexpr Acc kHeadroom = 4;  // a block may exceed its reference by so much: sums stay far from overflow
  // Where the exponentials may take the place of the logits, they lie in the order of memory and end with the row;
  // where they do, a block is visited once: its logits are gone after.
  constexpr bool kMayBeLogits = std::is_same<T, Acc>::value;
  const bool is_over_logits = kStore && static_cast<const void*>(exps) == row.x;
  const int64_t target_group = row.begin + (row.target - row.begin) / kLanes * kLanes;
  // work(logits, exponentials, ahead, clamps, groups) for the groups of [begin, end), one or kStep at a time, and
  // whether it stores the exponentials. A group that was copied has -inf in it, where exp() is asked to clamp.
  const auto for_each_group = [&](int64_t begin, int64_t end, bool stores, auto clamps,
                                  const auto& work) __attribute__((always_inline)) {
    alignas(64) T copy[kLanes];
    alignas(64) Acc rest[kLanes];
    for (int64_t i = begin; i < end;) {
      const int64_t ahead = row.ahead(i);
      const T* group = static_cast<const T*>(row.x) + i;
      Acc* to = kStore ? exps + i : nullptr;
      int64_t stop = i + kLanes;
      if (i == target_group || stop > end) {
        copy_masked(row, i, copy);
        if (kMayBeLogits && stop > end) to = rest;
        work(copy, to, 0, std::true_type(), Count<1>());
        i += kLanes;
      } else {
        stop = i + (end - i) / kLanes * kLanes;
        if (i < target_group && target_group < stop) stop = target_group;
        if (i < row.turn && row.turn < stop) stop = row.turn;
        for (; i + kStep * kLanes <= stop; i += kStep * kLanes, group += kStep * kLanes, to += kStep * kLanes)
          work(group, to, ahead, clamps, Count<kStep>());
        for (; i < stop; i += kLanes, group += kLanes, to += kLanes) work(group, to, ahead, clamps, Count<1>());
      }
      if (stores && kMayBeLogits && stop > end)
        std::memcpy(exps + stop - kLanes, rest, static_cast<size_t>(end - stop + kLanes) * sizeof(Acc));
    }
  };

  Real max[kVectors];
  for (int k = 0; k < kVectors; ++k) max[k] = broadcast<Acc>(-kInfinity);
  double sum = 0, weighted = 0;  // in units of exp(origin)
  Acc reference = 0;
  const auto origin = [&] { return ExpFrom<T>(reference).origin(); };
  const auto raise_reference = [&] {
    const Acc largest = max_lanes<Acc>(max);
    if (largest == -kInfinity) return;  // any finite reference makes every exponential zero
    const double before = origin();
    reference = largest;
    if (sum == 0) return;
    const double change = before - origin(), factor = std::exp(change);
    weighted = factor == 0 ? 0 : (weighted + sum * change) * factor;  // of doubles that far below it may be infinite
    sum *= factor;
  };

  for (int64_t begin = row.begin; begin < row.end; begin += kSpan<T>) {
    const int64_t end = row.end - begin < kSpan<T> ? row.end : begin + kSpan<T>;
    if (begin == row.begin || is_over_logits) {
      for_each_group(begin, end, false, std::true_type(),
                     [&](const T* group, Acc*, int64_t, auto, auto groups) __attribute__((always_inline)) {
                       for (int g = 0; g < decltype(groups)::value; ++g) {
                         Real v[kVectors];
                         Group<T>::load(group + g * kLanes, v);
                         for (int k = 0; k < kVectors; ++k) max[k] = maximum(v[k], max[k]);
                       }
                     });
      if (begin == row.begin || any_above<Acc>(max, reference + kHeadroom)) raise_reference();
    }
    Real sums[kVectors], products[kVectors];
    const auto visit = [&](auto clamps_all) __attribute__((always_inline)) {
      for (int k = 0; k < kVectors; ++k) sums[k] = products[k] = Real{};
      const ExpFrom<T> exp_from(reference);
      for_each_group(begin, end, kStore, clamps_all,
                     [&](const T* group, Acc* to, int64_t ahead, auto clamps, auto groups)
                         __attribute__((always_inline)) {
                           constexpr int kCount = decltype(groups)::value * kVectors;
                           Real v[kCount], u[kCount], e[kCount];
                           for (int g = 0; g < kCount / kVectors; ++g) {
                             prefetch(group + g * kLanes, ahead);
                             Group<T>::load(group + g * kLanes, v + g * kVectors);
                           }
                           for (int k = 0; k < kCount; ++k) max[k % kVectors] = maximum(v[k], max[k % kVectors]);
                           exp_from.template exps<decltype(clamps)::value, kCount>(v, u, e);
                           for (int k = 0; k < kCount; ++k) {
                             sums[k % kVectors] += e[k];
                             if (kWeighted) products[k % kVectors] += e[k] * u[k];
                             if (kStore) store(e[k], to + k * V::kWidth);
                           }
                         });
    };
    visit(std::false_type());
    if (any_above<Acc>(max, reference + kHeadroom)) {
      const Acc before = reference;
      raise_reference();
      if (reference != before) visit(std::false_type());
    }
    if (kWeighted) {
      Acc products_sum = sum_lanes<Acc>(products);
      if (!ExpFrom<T>::kClampsAlways && products_sum != products_sum) {  // 0 * -inf, of a masked class
        visit(std::true_type());
        products_sum = sum_lanes<Acc>(products);
      }
      weighted += products_sum * ExpFrom<T>::kUnit;
    }
    if (kStore) references[begin / kBlock] = reference;
    sum += sum_lanes<Acc>(sums);
  }
  state->max = max_lanes<Acc>(max);
  const double factor = state->max == -kInfinity ? 1.0 : std::exp(origin() - state->max);
  state->sum = sum * factor;  // a NaN stays one where every other logit is -inf
  state->weighted = (weighted + sum * (origin() - row.reference)) * factor;
}

// exp(z - lse) with lse rounded; what the rounding took away goes into the factor.
template <typename Acc>
struct RoundedLse {
  Acc lse, probability;

  ACCUMLOSS_INLINE explicit RoundedLse(const RowGrad<double>& gradient)
      : lse(static_cast<Acc>(gradient.lse_high)),
        probability(static_cast<Acc>(gradient.probability * std::exp(static_cast<double>(lse) - gradient.lse_high))) {}
};

// In what follows grad points at the class row.begin.

template <typename T>
ACCUMLOSS_INLINE void set_target(const RowSegment& row, const RowGrad<double>& gradient, T* grad) {
  using Acc = typename AccOf<T>::type;
  if (row.target < row.begin || row.target >= row.end) return;
  alignas(64) Acc value[kLanes] = {static_cast<Acc>(gradient.target)};
  store_block(value, 1, grad + (row.target - row.begin));
}

template <typename T>
void write_grad_plain(const RowSegment& row, const RowGrad<double>& gradient, T* grad) {
  using Acc = typename AccOf<T>::type;
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  constexpr int kVectors = Group<T>::kVectors;
  const T* x = static_cast<const T*>(row.x);
  const ExpFrom<T> exp_from(static_cast<Acc>(gradient.lse_high));
  const Acc probability = static_cast<Acc>(gradient.probability * std::exp(exp_from.origin() - gradient.lse_high));
  const auto visit = [&](const T* from, T* to) {
    Real v[kVectors];
    Group<T>::load(from, v);
    for (int k = 0; k < kVectors; ++k) {
      Real u;
      v[k] = exp_from.template exp<false>(v[k], &u) * probability;
    }
    Group<T>::store(v, to);
  };
  int64_t i = row.begin;
  for (; i + kLanes <= row.end; i += kLanes) {
    prefetch(x + i, row.ahead(i));
    visit(x + i, grad + (i - row.begin));
  }
  if (i < row.end) {
    T tail[kLanes] = {};
    const size_t bytes = static_cast<size_t>(row.end - i) * sizeof(T);
    std::memcpy(tail, x + i, bytes);
    visit(tail, tail);
    std::memcpy(grad + (i - row.begin), tail, bytes);
  }
  set_target(row, gradient, grad);
}

template <typename T>
void write_grad_from_exps_plain(const RowSegment& row, const RowGrad<double>& gradient,
                                const typename AccOf<T>::type* exps, const typename AccOf<T>::type* references,
                                T* grad) {
  using Acc = typename AccOf<T>::type;
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  constexpr int kVectors = Group<T>::kVectors;
  const auto factor_of = [&](Acc reference) {
    return static_cast<Acc>(gradient.probability * std::exp(ExpFrom<T>(reference).origin() - gradient.lse_high));
  };
  Acc reference = references[row.begin / kBlock], factor = factor_of(reference);
  for (int64_t begin = row.begin; begin < row.end; begin += kSpan<T>) {
    const int64_t end = row.end - begin < kSpan<T> ? row.end : begin + kSpan<T>;
    if (references[begin / kBlock] != reference) {
      reference = references[begin / kBlock];
      factor = factor_of(reference);
    }
    const auto visit = [&](const Acc* from, T* to) {
      Real v[kVectors];
      for (int k = 0; k < kVectors; ++k) v[k] = load(from + k * V::kWidth) * factor;
      Group<T>::store(v, to);
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) visit(exps + i, grad + (i - row.begin));
    if (i < end) {
      alignas(64) Acc rest[kLanes] = {};
      T tail[kLanes];
      const bool may_end_here = std::is_same<T, Acc>::value;  // see push_plain
      std::memcpy(rest, exps + i, static_cast<size_t>(may_end_here ? end - i : kLanes) * sizeof(Acc));
      visit(rest, tail);
      std::memcpy(grad + (i - row.begin), tail, static_cast<size_t>(end - i) * sizeof(T));
    }
  }
  set_target(row, gradient, grad);
}

// Rows ---------------------------------------------------------------------------------------------------------------

template <typename T>
double transform_one(const void* x, const LossOptions& options) {
  using Acc = typename AccOf<T>::type;
  alignas(64) Acc buffer[kLanes];
  load_block(static_cast<const T*>(x), 1, buffer);
  const Transform<Acc> transform(options);
  if (!transform.is_identity()) transform_block(buffer, kLanes, transform);
  return buffer[0];
}

template <typename T>
void push(const RowSegment& row, const LossOptions& options, RowState<double>* state, void* exps, void* references) {
  using Acc = typename AccOf<T>::type;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  if (is_plain(options)) {
    Acc* e = static_cast<Acc*>(exps);
    Acc* r = static_cast<Acc*>(references);
    if (options.metrics)
      return exps != nullptr ? push_plain<true, true, T>(row, state, e, r)
                             : push_plain<true, false, T>(row, state, e, r);
    return exps != nullptr ? push_plain<false, true, T>(row, state, e, r)
                           : push_plain<false, false, T>(row, state, e, r);
  }
  const T* x = static_cast<const T*>(row.x);
  const Transform<Acc> transform(options);
  alignas(64) Acc z[kBlock];
  for (int64_t begin = row.begin; begin < row.end; begin += kBlock) {
    const int64_t n = row.end - begin < kBlock ? row.end - begin : kBlock;
    const int64_t padded = round_up(n, kLanes);
    load_block(x + begin, n, z, row.ahead(begin));
    if (!transform.is_identity()) transform_block(z, padded, transform);
    if (row.target >= begin && row.target < begin + n) z[row.target - begin] = -kInfinity;
    if (options.label_smoothing > 0) {
      const int64_t at = row.target - begin;
      const bool here = at >= 0 && at < n;
      if (here) z[at] = static_cast<Acc>(row.reference);  // contributes nothing; row_result adds the label's own term
      const Acc* weight = row.weight != nullptr ? static_cast<const Acc*>(row.weight) + begin : nullptr;
      double linear = sum_linear(z, weight, n, row.reference);
      if (!(linear - linear == 0)) {
        const T* of_block = transform.softcap > 0 ? nullptr : x + begin;  // z(x) may be beyond Acc as well
        linear = sum_linear_wide(of_block, options.logit_scale, z, weight, n, here ? at : -1, row.reference);
      }
      state->linear += linear;
      if (here) z[at] = -kInfinity;
    }
    for (int64_t i = n; i < padded; ++i) z[i] = -kInfinity;

    const Acc block_max = max_block(z, padded);
    if (block_max > state->max) {
      const double factor = state->sum == 0 ? 1.0 : std::exp(state->max - static_cast<double>(block_max));
      state->sum *= factor;
      state->weighted = factor == 0 ? 0 : state->weighted * factor;
      state->max = block_max;
    }
    // all -inf so far: any finite reference makes every exponential zero (and keeps a NaN)
    const Acc reference = state->max == -kInfinity ? Acc(0) : static_cast<Acc>(state->max);
    Acc weighted = 0;
    Acc sum;
    if (exps != nullptr) {
      Acc* e = static_cast<Acc*>(exps) + begin;
      static_cast<Acc*>(references)[begin / kBlock] = reference;
      sum = options.metrics ? sum_exps<true, true>(z, padded, n, reference, e, &weighted)
                            : sum_exps<false, true>(z, padded, n, reference, e, &weighted);
    } else {
      sum = options.metrics ? sum_exps<true, false>(z, padded, n, reference, static_cast<Acc*>(nullptr), &weighted)
                            : sum_exps<false, false>(z, padded, n, reference, static_cast<Acc*>(nullptr), &weighted);
    }
    state->sum += sum;
    state->weighted += weighted + static_cast<double>(sum) * (static_cast<double>(reference) - row.reference);
  }
}

// What both gradient writers share: smoothing, the transform's slope, the label's entry.
template <typename T, typename Acc>
ACCUMLOSS_INLINE void finish_grad_block(const RowSegment& row, int64_t begin, int64_t n,
                                        const Transform<Acc>& transform, Acc smoothing, Acc target_grad, Acc* z,
                                        T* grad, Acc* g) {
  const int64_t padded = round_up(n, kLanes);
  if (smoothing != 0) {
    if (row.weight != nullptr) {
      const Acc* weight = static_cast<const Acc*>(row.weight) + begin;
      for (int64_t i = 0; i < n; ++i) g[i] -= smoothing * weight[i];
    } else {
      for (int64_t i = 0; i < n; ++i) g[i] -= smoothing;
    }
  }
  if (row.target >= begin && row.target < begin + n) g[row.target - begin] = target_grad;
  if (!transform.is_identity()) {
    load_block(static_cast<const T*>(row.x) + begin, n, z);
    multiply_by_slope(z, padded, transform, g);
  }
  store_block(g, n, grad + (begin - row.begin));
}

template <typename T>
void write_grad_to(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient, T* grad) {
  using Acc = typename AccOf<T>::type;
  using Real = typename Vectors<Acc>::Real;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  if (is_plain(options)) return write_grad_plain<T>(row, gradient, grad);
  const T* x = static_cast<const T*>(row.x);
  const Transform<Acc> transform(options);
  const RoundedLse<Acc> rounded(gradient);
  const Acc lse = rounded.lse, probability = rounded.probability;
  alignas(64) Acc z[kBlock];
  alignas(64) Acc g[kBlock];
  for (int64_t begin = row.begin; begin < row.end; begin += kBlock) {
    const int64_t n = row.end - begin < kBlock ? row.end - begin : kBlock;
    const int64_t padded = round_up(n, kLanes);
    load_block(x + begin, n, z, row.ahead(begin));
    if (!transform.is_identity()) transform_block(z, padded, transform);
    for (int64_t i = 0; i < padded; i += kWidth) {
      Real d = load(z + i) - lse;
      store(exp_clamped<Acc>(d) * probability, g + i);
    }
    finish_grad_block(row, begin, n, transform, static_cast<Acc>(gradient.smoothing), static_cast<Acc>(gradient.target),
                      z, grad, g);
  }
}

template <typename T>
void write_grad_from_exps_to(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient,
                             const typename AccOf<T>::type* exps, const typename AccOf<T>::type* references, T* grad) {
  using Acc = typename AccOf<T>::type;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  if (is_plain(options)) return write_grad_from_exps_plain<T>(row, gradient, exps, references, grad);
  const Transform<Acc> transform(options);
  alignas(64) Acc z[kBlock];
  alignas(64) Acc g[kBlock];
  for (int64_t begin = row.begin; begin < row.end; begin += kBlock) {
    const int64_t n = row.end - begin < kBlock ? row.end - begin : kBlock;
    const double reference = references[begin / kBlock];
    const Acc factor = static_cast<Acc>(gradient.probability * std::exp(reference - gradient.lse_high));
    load_block(exps + begin, n, g);
    for (int64_t i = 0; i < n; i += kWidth) store(load(g + i) * factor, g + i);
    finish_grad_block(row, begin, n, transform, static_cast<Acc>(gradient.smoothing), static_cast<Acc>(gradient.target),
                      z, grad, g);
  }
}

// What is written past the caches is put together here first: lines are written whole wherever rows begin.
constexpr int64_t kStaged = 2048;

// to = from, past the caches but for the lines at the ends, which are shared with others.
template <typename T>
ACCUMLOSS_INLINE void stream(const T* from, int64_t n, T* to) {
  const char* const source = reinterpret_cast<const char*>(from);
  char* const target = reinterpret_cast<char*>(to);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  int64_t begin = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(target) % 64);
  if (begin > bytes) begin = bytes;
  const int64_t end = begin + (bytes - begin) / 64 * 64;
  std::memcpy(target, source, static_cast<size_t>(begin));
  for (int64_t i = begin; i < end; i += kVectorBytes) {
    FloatReal v;
    std::memcpy(&v, source + i, sizeof v);
    stream_bytes(v, target + i);
  }
  std::memcpy(target + end, source + end, static_cast<size_t>(bytes - end));
}

// write(row, grad) with grad at the class row.begin, for the segment as it is or in parts that go past the caches
template <typename T, typename Write>
ACCUMLOSS_INLINE void write_or_stream(const RowSegment& row, bool streams, T* grad, const Write& write) {
  if (!streams) return write(row, grad + row.begin);
  alignas(64) T staged[kStaged];
  RowSegment part = row;
  for (; part.begin < row.end; part.begin = part.end) {
    part.end = row.end - part.begin < kStaged ? row.end : part.begin + kStaged;
    write(part, staged);
    stream(staged, part.end - part.begin, grad + part.begin);
  }
}

template <typename T>
void write_grad(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient, bool streams,
                void* grad) {
  write_or_stream(row, streams, static_cast<T*>(grad),
                  [&](const RowSegment& part, T* to) { write_grad_to<T>(part, options, gradient, to); });
}

template <typename T>
void write_grad_from_exps(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient,
                          const void* exps, const void* references, bool streams, void* grad) {
  using Acc = typename AccOf<T>::type;
  write_or_stream(row, streams, static_cast<T*>(grad), [&](const RowSegment& part, T* to) {
    write_grad_from_exps_to<T>(part, options, gradient, static_cast<const Acc*>(exps),
                               static_cast<const Acc*>(references), to);
  });
}

template <typename T>
bool label_is_argmax(const void* x, int64_t V, int64_t target) {
  using Acc = typename AccOf<T>::type;
  const T* logits = static_cast<const T*>(x);
  alignas(64) Acc z[kBlock];
  load_block(logits + target, 1, z);
  const Acc label = z[0];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    load_block(logits + begin, n, z);
    for (int64_t i = 0; i < n; ++i)
      if (z[i] > label || (z[i] == label && begin + i < target)) return false;
  }
  return true;
}

template <typename T>
void scale(void* values, int64_t n, double factor) {
  using Acc = typename AccOf<T>::type;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  T* x = static_cast<T*>(values);
  const Acc f = static_cast<Acc>(factor);
  alignas(64) Acc z[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    load_block(x + begin, count, z);
    for (int64_t i = 0; i < count; i += kWidth) store(load(z + i) * f, z + i);
    store_block(z, count, x + begin);
  }
}

// Short rows ---------------------------------------------------------------------------------------------------------

// v where mask has all bits, 0, and not NaN, where it has none.
ACCUMLOSS_INLINE FloatReal keep(FloatReal v, Vectors<float>::Int mask) {
  return reinterpret_cast<FloatReal>(reinterpret_cast<Vectors<float>::Int>(v) & mask);
}

// What the classes other than the label come to in each row of a group, and what the gradient is made of.
struct GroupSums {
  alignas(64) int64_t items[kGroup];                    // all bits, or none for a row that is ignored
  alignas(64) int64_t labels[kGroup];                   // 0 for a row that is ignored
  alignas(64) double weights[kGroup], factors[kGroup];  // of the loss and of the gradient; 0 for a row that is ignored
  alignas(64) float target[kGroup];
  alignas(64) float others_max[kGroup];
  alignas(64) float sums[kGroup];      // of exp(z - others_max)
  alignas(64) float weighted[kGroup];  // of exp(z - others_max) (z - others_max); with metrics
  alignas(64) float other_factor[kGroup], label_grad[kGroup];
  alignas(64) int32_t has_grad[kGroup];   // all bits, or none for a row of zeros, whatever its logits
  alignas(64) int32_t is_argmax[kGroup];  // all bits where the label is the first of the largest logits; with metrics
};

// value where mask has all bits, 0, and not NaN, where it has none. A select would become a branch, which labels that
// are ignored here and there make mispredicted.
ACCUMLOSS_INLINE double keep(double value, int64_t mask) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= mask;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// The sum of kGroup numbers in an order that no vector width changes.
ACCUMLOSS_INLINE double sum_group(const double* values) {
  double lanes[8] = {};
  for (int r = 0; r < kGroup; r += 8)
    for (int k = 0; k < 8; ++k) lanes[k] += values[r + k];
  for (int half = 4; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

ACCUMLOSS_INLINE void begin_group(ShortRows& rows, GroupSums& group) {
  for (int r = static_cast<int>(rows.count); r < kGroup; ++r) rows.labels[r] = rows.ignore_index;
  for (int r = 0; r < kGroup; ++r) {
    group.items[r] = -static_cast<int64_t>(rows.labels[r] != rows.ignore_index);
    group.labels[r] = rows.labels[r] & group.items[r];
    group.weights[r] = keep(1.0, group.items[r]);
  }
  if (rows.weight != nullptr)
    for (int r = 0; r < kGroup; ++r) group.weights[r] = keep(rows.weight[group.labels[r]], group.items[r]);
  for (int r = 0; r < kGroup; ++r) group.factors[r] = keep(rows.grad * group.weights[r], group.items[r]);
}

// is_argmax of the group; comes_first(r) is asked where the label of a row that counts ties with another class.
template <typename ComesFirst>
ACCUMLOSS_INLINE void find_argmax(GroupSums& group, const ComesFirst& comes_first) {
  using Int = Vectors<float>::Int;
  constexpr int kWidth = Vectors<float>::kWidth;
  Int any_tie = {};
  for (int r = 0; r < kGroup; r += kWidth) {
    const auto target = load(group.target + r), other = load(group.others_max + r);
    const Int leads = target > other;
    any_tie |= target == other;
    std::memcpy(group.is_argmax + r, &leads, sizeof leads);
  }
  int32_t ties[kWidth], tie = 0;
  std::memcpy(ties, &any_tie, sizeof ties);
  for (int k = 0; k < kWidth; ++k) tie |= ties[k];
  for (int r = 0; tie != 0 && r < kGroup; ++r)
    if (group.target[r] == group.others_max[r] && group.items[r] != 0)
      group.is_argmax[r] = -static_cast<int>(comes_first(r));
}

// row_result and RowGrad of row.h, for a vector of rows at a time, in float: the rounding of the one difference that
// may be large is recovered, and every other step costs a unit or two.
ACCUMLOSS_INLINE void finish_group(ShortRows& rows, bool metrics, GroupSums& group) {
  using Real = Vectors<float>::Real;
  using Int = Vectors<float>::Int;
  constexpr int kWidth = Vectors<float>::kWidth;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  alignas(64) float factor_of[kGroup], log_totals[kGroup], largest[kGroup];
  alignas(64) float others_scale[kGroup];                    // exp(others_max - lse)
  alignas(64) float references[kGroup], terms_base[kGroup];  // of the entropy; what the weighted sums are relative to
  for (int64_t r = 0; r < kGroup; ++r) factor_of[r] = static_cast<float>(group.factors[r]);
  for (int64_t r = 0; r < kGroup; r += kWidth) {
    const Real y = load(group.target + r), other = load(group.others_max + r);
    const Real max = other > y ? other : y, min = other > y ? y : other;
    Real gap = min - max;
    const Real back = gap + max;
    Real lost = (min - back) + ((back - gap) - max);  // min - max = gap + lost, exactly
    lost = min == -kInfinity ? Real{} : lost;
    const Real e = exp_clamped<float>(gap);
    const Real smaller = e * lost + e + (max - max);  // exp(min - max); NaN where max is infinite
    const auto label_leads = !(other > y);
    const Real sum = load(group.sums + r);
    const Real s = label_leads ? sum * smaller : sum;
    const Real e_y = label_leads ? broadcast<float>(1) : smaller;
    const Real total = s + e_y;
    const Real above = label_leads ? s : (sum - 1.0f) + smaller;
    const Real log_total = vector_log1p(above);
    store(log_total, log_totals + r);
    const Real of_row = load(factor_of + r), factor = of_row / total;
    const Int has_grad = of_row != 0;
    std::memcpy(group.has_grad + r, &has_grad, sizeof has_grad);
    store(label_leads ? factor * smaller : factor, group.other_factor + r);
    store((label_leads ? smaller : broadcast(1.f)) / total, others_scale + r);
    store(keep(-(factor * s), has_grad), group.label_grad + r);
    store(max, largest + r);
    const Real reference = other - y > static_cast<float>(kFarBelow) ? other : y;  // entropy_reference
    store(y - y == 0 ? reference : Real{}, references + r);
    store(other == -kInfinity ? Real{} : other, terms_base + r);
  }
  alignas(64) double terms[kGroup];
  for (int r = 0; r < kGroup; ++r) {  // no branches here and below: vectors of doubles
    const double log_total = log_totals[r], max = largest[r];
    rows.nll[r] = keep((max - static_cast<double>(group.target[r])) + log_total, group.items[r]);
    rows.lse[r] = keep(max + log_total, group.items[r]);
    terms[r] = group.weights[r] * rows.nll[r];
  }
  rows.loss_sum = sum_group(terms);
  rows.weight_sum = sum_group(group.weights);
  rows.num_items = rows.num_correct = 0;
  for (int r = 0; r < kGroup; ++r) rows.num_items -= group.items[r];
  rows.entropy_sum = 0;
  if (!metrics) return;
  for (int r = 0; r < kGroup; ++r) {
    const double reference = references[r], sum = group.sums[r];
    const double weighted = group.weighted[r] + sum * (terms_base[r] - reference);
    terms[r] = keep((rows.lse[r] - reference) - weighted * others_scale[r], group.items[r]);
  }
  rows.entropy_sum = sum_group(terms);
  for (int r = 0; r < kGroup; ++r)
    rows.num_correct -= group.is_argmax[r] & group.items[r] & -static_cast<int64_t>(rows.nll[r] == rows.nll[r]);
}

// At most kShort classes: class by class, a lane for each row. z (V, kGroup).
template <typename T, bool kMetrics>
void transposed_rows(ShortRows& rows, void* grad) {
  using Real = Vectors<float>::Real;
  using Int = Vectors<float>::Int;
  constexpr int kWidth = Vectors<float>::kWidth;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLowest = Vectors<float>::kLowest;
  const int64_t V = rows.V, count = rows.count;
  alignas(64) float row_major[kGroup * kShort];
  alignas(64) float z[kShort * kGroup];
  alignas(64) double sums[kGroup] = {};
  GroupSums group;
  begin_group(rows, group);
  load_block(static_cast<const T*>(rows.x), count * V, row_major);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < V; ++j) z[j * kGroup + r] = row_major[r * V + j];
  for (int64_t r = count; r < kGroup; ++r)
    for (int64_t j = 0; j < V; ++j) z[j * kGroup + r] = 0;
  for (int64_t r = 0; r < kGroup; ++r) group.target[r] = z[group.labels[r] * kGroup + r];
  for (int64_t r = 0; r < kGroup; ++r) z[group.labels[r] * kGroup + r] = -kInfinity;

  for (int64_t r = 0; r < kGroup; r += kWidth) {
    Real max = broadcast<float>(-kInfinity);
    for (int64_t j = 0; j < V; ++j) max = maximum(load(z + j * kGroup + r), max);
    store(max, group.others_max + r);
  }
  if (kMetrics)
    find_argmax(group, [&](int r) __attribute__((always_inline)) {
      int64_t j = 0;
      while (j < group.labels[r] && z[j * kGroup + r] != group.target[r]) ++j;
      return j == group.labels[r];
    });
  for (int64_t r = 0; r < kGroup; r += kWidth) {
    const Real max = load(group.others_max + r), reference = max == -kInfinity ? Real{} : max;
    Real products = {};
    for (int64_t j = 0; j < V; ++j) {
      const Real v = load(z + j * kGroup + r);
      Real d, e;
      exps_of_differences<T, float, 1>(&v, reference, &d, &e);
      store(e, z + j * kGroup + r);
      if (kMetrics) products += e * maximum(broadcast(kLowest), d);
    }
    if (kMetrics) store(products, group.weighted + r);
  }
  for (int64_t j = 0; j < V; ++j)
    for (int64_t r = 0; r < kGroup; ++r) sums[r] += z[j * kGroup + r];
  for (int64_t r = 0; r < kGroup; ++r) group.sums[r] = static_cast<float>(sums[r]);
  finish_group(rows, kMetrics, group);

  if (grad == nullptr) return;
  for (int64_t r = 0; r < kGroup; r += kWidth) {
    const Real factor = load(group.other_factor + r);
    Int has_grad;
    std::memcpy(&has_grad, group.has_grad + r, sizeof has_grad);
    for (int64_t j = 0; j < V; ++j) store(keep(load(z + j * kGroup + r) * factor, has_grad), z + j * kGroup + r);
  }
  for (int64_t r = 0; r < count; ++r) {
    float* g = row_major + r * V;
    for (int64_t j = 0; j < V; ++j) g[j] = z[j * kGroup + r];
    g[group.labels[r]] = group.label_grad[r];
  }
  store_block(row_major, count * V, static_cast<T*>(grad));
}

// Without what a NaN needs that the machine did not make.
template <typename T>
ACCUMLOSS_INLINE void store_result(FloatReal v, T* x) {
  if constexpr (std::is_same<T, BFloat16>::value)
    store_bits(round_to_bfloat16(v) >> 16, x);
  else
    store(v, x);
}

// 0, 1, 2, ...: which class a lane holds.
struct Classes {
  alignas(64) int32_t index[kMedium];
  constexpr Classes() : index() {
    for (int j = 0; j < kMedium; ++j) index[j] = j;
  }
};
constexpr Classes kClasses;

// More classes than lanes: row by row, the classes in the lanes; what is done once for a row is done for all of them
// together, the folding of their lanes included. exps (kGroup, stride), in the order of memory.
template <typename T, bool kMetrics>
void grouped_rows(ShortRows& rows, void* grad) {
  using Real = Vectors<float>::Real;
  using Int = Vectors<float>::Int;
  constexpr int kWidth = Vectors<float>::kWidth;
  constexpr int kVectors = kLanes / kWidth;
  constexpr int kHalf = kLanes / 2;
  constexpr int64_t kTogether = 192;  // classes, of which a group fits into the first-level cache
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLowest = Vectors<float>::kLowest;
  const int64_t V = rows.V, count = rows.count, stride = round_up(V, kHalf);
  const T* const x = static_cast<const T*>(rows.x);
  alignas(64) float exps[kGroup * kMedium];
  alignas(64) float lanes[kGroup * kWidth], more_lanes[kMetrics ? kGroup * kWidth : 1];
  alignas(64) T targets[kGroup] = {};
  alignas(64) T last[kMedium];  // the last row, with room to read past its end: no row follows it
  GroupSums group;
  begin_group(rows, group);
  int items[kGroup], num_items = 0;
  for (int r = 0; r < count; ++r) {  // those that are ignored are not read; what is left of their sums is not used
    items[num_items] = r;
    num_items += static_cast<int>(group.items[r] & 1);
  }
  if (num_items < kGroup) {
    std::memset(group.others_max, 0, sizeof group.others_max);
    std::memset(lanes, 0, sizeof lanes);
    if (kMetrics) std::memset(more_lanes, 0, sizeof more_lanes);
  }
  // of the next group, if the same thread is going to visit it
  const int64_t ahead = rows.has_next ? kGroup * V : 0;
  const T* const to_write = grad != nullptr ? static_cast<const T*>(grad) : x;
  std::memset(last + V, 0, static_cast<size_t>(stride - V) * sizeof(T));
  std::memcpy(last, x + (count - 1) * V, static_cast<size_t>(V) * sizeof(T));
  // work(j, lane, may_end) for each vector of a row; what lies in a lane does not depend on the width
  const auto for_each_vector = [&](const auto& work) __attribute__((always_inline)) {
    int64_t j = 0;
    for (; j + kLanes < stride; j += kLanes)
      for (int k = 0; k < kVectors; ++k) work(j + k * kWidth, k, std::false_type());
    if (stride - j == kLanes) {
      for (int k = 0; k < kVectors / 2; ++k) work(j + k * kWidth, k, std::false_type());
      for (int k = kVectors / 2; k < kVectors; ++k) work(j + k * kWidth, k, std::true_type());
    } else {
      for (int k = 0; k < kVectors / 2; ++k) work(j + k * kWidth, k, std::true_type());
    }
  };

  // the logits of the classes other than the label go to exps; their maximum is left
  const auto find_max = [&](int r) __attribute__((always_inline)) {
    const T* const row = r + 1 < count ? x + r * V : last;
    float* const e = exps + r * stride;
    const Int label = static_cast<int32_t>(group.labels[r]) - Int{};
    Real max[kVectors];
    for (int k = 0; k < kVectors; ++k) max[k] = broadcast(-kInfinity);
    for_each_vector([&](int64_t j, int k, auto may_end) __attribute__((always_inline)) {
      Int index;
      std::memcpy(&index, kClasses.index + j, sizeof index);
      if (k * kWidth * sizeof(T) % 64 == 0) __builtin_prefetch(x + r * V + j + ahead, 0);
      Real v = load(row + j);
      v = index == label ? broadcast(-kInfinity) : v;
      if (decltype(may_end)::value) v = index >= static_cast<int32_t>(V) ? broadcast(-kInfinity) : v;
      max[k] = maximum(v, max[k]);
      store(v, e + j);
    });
    std::memcpy(&targets[r], row + group.labels[r], sizeof(T));
    for (int k = 1; k < kVectors; ++k) max[0] = maximum(max[k], max[0]);
    return max[0];
  };
  const auto sum_up = [&](int r) __attribute__((always_inline)) {
    float* const e = exps + r * stride;
    const float largest = group.others_max[r];
    const Real reference = broadcast(largest == -kInfinity ? 0.f : largest);
    Real sums[kVectors] = {}, products[kVectors] = {};
    const auto visit = [&](int64_t begin, auto vectors) __attribute__((always_inline)) {
      constexpr int kCount = decltype(vectors)::value;
      Real v[kCount], d[kCount], exp[kCount];
      for (int i = 0; i < kCount; ++i) {
        const int64_t j = begin + i * kWidth;
        v[i] = load(e + j);
        if (i * kWidth * sizeof(T) % 64 == 0) __builtin_prefetch(to_write + r * V + j + ahead, 1);
      }
      exps_of_differences<T, float, kCount>(v, reference, d, exp);
      for (int i = 0; i < kCount; ++i) {
        sums[i % kVectors] += exp[i];
        if (kMetrics) products[i % kVectors] += exp[i] * maximum(broadcast(kLowest), d[i]);
        store(exp[i], e + begin + i * kWidth);
      }
    };
    // as many at once as there are registers for; then what is left, a multiple of kHalf classes
    constexpr int64_t kStep = kVectorBytes == 64 ? 2 * kLanes : kLanes;
    int64_t j = 0;
    for (; j + kStep <= stride; j += kStep) visit(j, Count<kStep / kWidth>());
    if (stride - j == 3 * kHalf) visit(j, Count<3 * kHalf / kWidth>());
    if (stride - j == 2 * kHalf) visit(j, Count<2 * kHalf / kWidth>());
    if (stride - j == kHalf) visit(j, Count<kHalf / kWidth>());
    store(sum_vectors<float>(sums), lanes + r * kWidth);
    if (kMetrics) store(sum_vectors<float>(products), more_lanes + r * kWidth);
  };
  if (stride <= kTogether) {
    for (int i = 0; i < num_items; ++i) store(find_max(items[i]), lanes + items[i] * kWidth);
    fold_rows(lanes, kGroup, group.others_max, Larger());
    for (int i = 0; i < num_items; ++i) sum_up(items[i]);
  } else {  // row by row, while they are in the cache; the next one's maximum while this one's is awaited
    for (int i = 0; i <= num_items; ++i) {
      if (i < num_items) group.others_max[items[i]] = fold<float, kWidth>(find_max(items[i]), Larger());
      if (i > 0) sum_up(items[i - 1]);
    }
  }
  for (int r = 0; r < kGroup; r += kWidth) store(load(targets + r), group.target + r);
  if (kMetrics)
    find_argmax(
        group, [&](int r) __attribute__((always_inline)) { return label_is_argmax<T>(x + r * V, V, group.labels[r]); });
  fold_rows(lanes, kGroup, group.sums, Add());
  if (kMetrics) fold_rows(more_lanes, kGroup, group.weighted, Add());
  finish_group(rows, kMetrics, group);

  if (grad == nullptr) return;
  T* const out = static_cast<T*>(grad);
  alignas(64) T label_grads[kGroup];
  for (int r = 0; r < kGroup; r += kWidth) store_result(load(group.label_grad + r), label_grads + r);
  for (int r = 0; r < count; ++r) {
    if (stride > kTogether && group.has_grad[r] == 0) {  // of short rows, a mispredicted branch would cost as much
      std::memset(static_cast<void*>(out + r * V), 0, static_cast<size_t>(V) * sizeof(T));
      continue;
    }
    const float* const e = exps + r * stride;
    const Real factor = broadcast(group.other_factor[r]);
    const Int has_grad = group.has_grad[r] - Int{};
    // what is written past the end of a row is overwritten by the next, whose logits have been read
    T* const to = r + 1 < count ? out + r * V : last;
    for (int64_t j = 0; j < stride; j += kWidth) store_result(keep(load(e + j) * factor, has_grad), to + j);
    if (r + 1 == count) std::memcpy(out + r * V, last, static_cast<size_t>(V) * sizeof(T));
    out[r * V + group.labels[r]] = label_grads[r];
  }
}

template <typename T>
void short_rows(ShortRows& rows, bool metrics, void* grad) {
  if (rows.V > kShort) return metrics ? grouped_rows<T, true>(rows, grad) : grouped_rows<T, false>(rows, grad);
  return metrics ? transposed_rows<T, true>(rows, grad) : transposed_rows<T, false>(rows, grad);
}

template <typename T>
constexpr RowKernels kernels_of() {
  return {transform_one<T>,   push<T>,       write_grad<T>, write_grad_from_exps<T>,
          label_is_argmax<T>, short_rows<T>, scale<T>};
}
template <>
constexpr RowKernels kernels_of<double>() {
  using T = double;
  return {transform_one<T>, push<T>, write_grad<T>, write_grad_from_exps<T>, label_is_argmax<T>, nullptr, scale<T>};
}

}  // namespace

#define ACCUMLOSS_STRING(name) #name
#define ACCUMLOSS_NAME(name) ACCUMLOSS_STRING(name)

const InstructionSet& ACCUMLOSS_ISA() {
  static constexpr InstructionSet set = {
      ACCUMLOSS_NAME(ACCUMLOSS_ISA),
      {kernels_of<BFloat16>(), kernels_of<Float16>(), kernels_of<float>(), kernels_of<double>()}};
  return set;
}

}  // namespace cpu
}  // namespace accumloss
