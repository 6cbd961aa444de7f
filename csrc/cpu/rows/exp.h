// exp, log1p and tanh of vectors.
#pragma once

#include <cmath>

#include "element.h"

namespace accumloss {
namespace cpu {
namespace {

// A constant as a variable: in a loop that uses it often and has too few registers, GCC would load a constant from
// memory for each of its uses.
struct Held {
  template <typename Real>
  ACCUMLOSS_INLINE Real operator()(Real value) const {
#if defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#endif
    return value;
  }
};
// For a loop that uses it little.
struct AsItIs {
  template <typename Real>
  ACCUMLOSS_INLINE Real operator()(Real value) const {
    return value;
  }
};

// What exp() takes in each lane. tail: the coefficients of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, the highest
// first.
template <typename Acc>
struct ExpConstants {
  using Real = typename Vectors<Acc>::Real;
  static constexpr int kTail = sizeof(Acc) == 4 ? 5 : 12;
  Real log2e, magic, lowest, one, tail[kTail];

  template <typename Keep>
  ACCUMLOSS_INLINE explicit ExpConstants(const Keep& keep)
      : log2e(keep(broadcast(Acc(1.4426950408889634)))),
        magic(keep(broadcast(Acc(Vectors<Acc>::kMagic)))),
        lowest(keep(broadcast(Acc(Vectors<Acc>::kLowest)))),
        one(keep(broadcast(Acc(1)))) {
    if constexpr (sizeof(Acc) == 4) {
      constexpr float kMinimax[] = {0.00138131449136f, 0.00836941882809f, 0.0416684567812f, 0.166665147915f,
                                    0.499999930507f};  // 3.3e-9 of exp(r)
      for (int i = 0; i < kTail; ++i) tail[i] = keep(broadcast(kMinimax[i]));
    } else {
      constexpr double kTaylor[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                    1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                    1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};  // 4e-18
      for (int i = 0; i < kTail; ++i) tail[i] = keep(broadcast(kTaylor[i]));
    }
  }
};

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
  const ExpConstants<Acc> c{AsItIs()};
  const Real shifted = x * c.log2e + c.magic;
  const Real n = shifted - c.magic;
  const Real r = remainder(x, n);
  Real e = c.tail[0];
  for (int i = 1; i < c.kTail; ++i) e = e * r + c.tail[i];
  e = (e * r + c.one) * r + c.one;
  const Real power = reinterpret_cast<Real>(reinterpret_cast<Int>(shifted) << V::kMantissaBits);  // 2^n
  return zero ? Real{} : e * power;
}

// e = exp(z - reference) of kCount vectors, d = z - reference; for fp32 logits with what that subtraction rounds away,
// which is up to 4e-6. Side by side in each step: what waits for a result waits outside of the core's schedulers.
template <typename T, typename Acc, int kCount>
ACCUMLOSS_INLINE void exps_of_differences(const typename Vectors<Acc>::Real* z, typename Vectors<Acc>::Real reference,
                                          typename Vectors<Acc>::Real* d, typename Vectors<Acc>::Real* e,
                                          const ExpConstants<Acc>& c = ExpConstants<Acc>(AsItIs())) {
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
  for (int k = 0; k < kCount; ++k) shifted[k] = d[k] * c.log2e + c.magic;
  for (int k = 0; k < kCount; ++k) n[k] = shifted[k] - c.magic;
  for (int k = 0; k < kCount; ++k) r[k] = remainder(d[k], n[k]);
  if (kHasLow)
    for (int k = 0; k < kCount; ++k) r[k] = r[k] + low[k];
  for (int k = 0; k < kCount; ++k) e[k] = r[k] * c.tail[0] + c.tail[1];
  for (int i = 2; i < c.kTail; ++i)
    for (int k = 0; k < kCount; ++k) e[k] = e[k] * r[k] + c.tail[i];
  for (int k = 0; k < kCount; ++k) e[k] = e[k] * r[k] + c.one;
  for (int k = 0; k < kCount; ++k) e[k] = e[k] * r[k] + c.one;
  for (int k = 0; k < kCount; ++k) {
    const Real power = reinterpret_cast<Real>(reinterpret_cast<Int>(shifted[k]) << V::kMantissaBits);  // 2^n
    e[k] = d[k] < c.lowest ? Real{} : e[k] * power;
  }
}

// exp(z - origin) of the logits of a row, z at most some 80 above the origin. The origin is what the caller asked for,
// give or take a rounding.
template <typename T>
struct ExpFrom {
  using Acc = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
  using Real = typename Vectors<Acc>::Real;
  static constexpr double kUnit = 1;            // of u in z
  static constexpr bool kClampsAlways = false;  // whether u exp() is 0 at -inf also where exps() is not asked to clamp
  const Acc origin_;
  const ExpConstants<Acc> constants_;

  template <typename Keep = AsItIs>
  ACCUMLOSS_INLINE explicit ExpFrom(Acc origin, const Keep& keep = Keep()) : origin_(origin), constants_(keep) {}
  ACCUMLOSS_INLINE double origin() const { return origin_; }
  // u = (z - origin) / kUnit; where kClamps, raised to where the exponential is zero, so that u exp() is 0 at -inf
  template <bool kClamps, int kCount>
  ACCUMLOSS_INLINE void exps(const Real* z, Real* u, Real* e) const {
    exps_of_differences<T, Acc, kCount>(z, broadcast(origin_), u, e, constants_);
    for (int k = 0; kClamps && k < kCount; ++k) u[k] = u[k] < constants_.lowest ? constants_.lowest : u[k];
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
  Real lowest_, magic_, coefficients_[6];  // of 2^(2f) on [-1/4, 1/4], minimax, 9e-8; the highest first

  template <typename Keep = AsItIs>
  ACCUMLOSS_INLINE explicit ExpFrom(float origin, const Keep& keep = Keep())
      : scale_(kScale), lowest_(keep(broadcast(float(kLowest)))), magic_(keep(broadcast(float(kMagic)))) {
    constexpr float kCoefficients[] = {0.0424471274018f, 0.154744207859f, 0.444058686495f,
                                       0.960889697075f,  1.3862940073f,   1.0f};
    for (int i = 0; i < 6; ++i) coefficients_[i] = keep(broadcast(kCoefficients[i]));
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
  // kCount of them, side by side in each step: what waits for a result waits outside of the core's schedulers.
  template <bool kClamps, int kCount>
  ACCUMLOSS_INLINE void exps(const Real* z, Real* u, Real* e) const {
    Real shifted[kCount], f[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) u[k] = kFused ? z[k] * scale_ + offset_ : (z[k] + offset_) * scale_;
    for (int k = 0; k < kCount; ++k) u[k] = maximum(lowest_, u[k]);  // a NaN stays
    for (int k = 0; k < kCount; ++k) shifted[k] = u[k] + magic_;
    for (int k = 0; k < kCount; ++k) f[k] = shifted[k] - magic_;
    for (int k = 0; k < kCount; ++k) f[k] = u[k] - f[k];
    for (int k = 0; k < kCount; ++k) p[k] = f[k] * coefficients_[0] + coefficients_[1];
    for (int i = 2; i < 6; ++i)
      for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + coefficients_[i];
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

}  // namespace
}  // namespace cpu
}  // namespace accumloss
