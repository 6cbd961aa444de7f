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

// exp(z - origin) of the logits of a row, z at most some 80 above the origin. The origin is near what the caller asked
// for.
template <typename T>
struct ExpFrom {
  using Acc = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
  using Real = typename Vectors<Acc>::Real;
  static constexpr bool kClampsAlways = false;  // whether u exp() is 0 at -inf also where exps() is not asked to clamp
  const Acc origin_;
  const ExpConstants<Acc> constants_;

  template <typename Keep = AsItIs>
  ACCUMLOSS_INLINE explicit ExpFrom(Acc origin, const Keep& keep = Keep()) : origin_(origin), constants_(keep) {}
  // With the constants of another one, in the same registers.
  ACCUMLOSS_INLINE ExpFrom(Acc origin, const ExpFrom& other) : origin_(origin), constants_(other.constants_) {}
  ACCUMLOSS_INLINE double origin() const { return origin_; }
  ACCUMLOSS_INLINE double u_origin() const { return origin_; }
  static constexpr bool is_far() { return false; }
  static constexpr bool is_far_at(Acc) { return false; }
  // u = z - u_origin(); where kClamps, raised to where the exponential is zero, so that u exp() is 0 at -inf
  template <bool kClamps, int kCount, bool kIsFar>
  ACCUMLOSS_INLINE void exps(const Real* z, Real* u, Real* e) const {
    exps_of_differences<T, Acc, kCount>(z, broadcast(origin_), u, e, constants_);
    for (int k = 0; kClamps && k < kCount; ++k) u[k] = u[k] < constants_.lowest ? constants_.lowest : u[k];
  }
  // Of an origin that is not far: u = z - u_origin() as it is, however low.
  template <int kCount>
  ACCUMLOSS_INLINE void exps_and_differences(const Real* z, Real* u, Real* e) const {
    exps_of_differences<T, Acc, kCount>(z, broadcast(origin_), u, e, constants_);
  }
};

// bf16 logits, whose gradient keeps 8 bits: 2^(n - k) exp(z - n log(2)), n the whole number next to z / log(2), and k
// that of the origin. Another k gives the same digits, so that the sums of a row from several origins are the same. The
// exponential is within 2e-7 wherever z is.
template <>
struct ExpFrom<BFloat16> {
  using Acc = float;
  using Real = Vectors<float>::Real;
  using Int = Vectors<float>::Int;
  static constexpr bool kClampsAlways = true;
  static constexpr float kLog2e = 1.44269502f;
  // From here on two bf16 are equal or 16 apart, and their difference is exact: the origin is a bf16, and is subtracted
  // first.
  static constexpr float kFar = 0x1p12f;
  // What remainder() takes for log(2) is too small by so much: exp(z) comes out exp(n kLost) times as large.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr double kLost = 0.6931471805599453 - static_cast<double>(Vectors<float>::kLn2);
#else
  static constexpr double kLost = 0;
#endif
  bool is_far_;
  float origin_, k_;
  Real lowest_, magic_, log2e_, coefficients_[6];  // of exp(r) on |r| <= ln(2) / 2, minimax, 9e-8; the highest first

  template <typename Keep = AsItIs>
  ACCUMLOSS_INLINE explicit ExpFrom(float origin, const Keep& keep = Keep()) : log2e_(keep(broadcast(float(kLog2e)))) {
    constexpr float kCoefficients[] = {0.008290272f, 0.04189816f, 0.16667639f, 0.49999148f, 0.9999997f, 1.0f};
    for (int i = 0; i < 6; ++i) coefficients_[i] = keep(broadcast(kCoefficients[i]));
    start_from(origin, keep);
  }
  // With the constants of another one, in the same registers.
  template <typename Keep = AsItIs>
  ACCUMLOSS_INLINE ExpFrom(float origin, const ExpFrom& other, const Keep& keep = Keep()) : ExpFrom(other) {
    start_from(origin, keep);
  }
  static ACCUMLOSS_INLINE bool is_far_at(float origin) { return !(std::fabs(origin) < kFar); }
  template <typename Keep>
  ACCUMLOSS_INLINE void start_from(float origin, const Keep& keep) {
    is_far_ = is_far_at(origin);
    origin_ = origin;
    k_ = 0;
    if (is_far_) {
      uint32_t bits;
      std::memcpy(&bits, &origin, sizeof bits);
      bits = (bits + 0x8000u) & 0xffff0000u;
      std::memcpy(&origin_, &bits, sizeof bits);
    } else {
      k_ = std::nearbyint(origin * kLog2e);
    }
    magic_ = keep(broadcast(Vectors<float>::kMagic - k_));
    lowest_ = keep(broadcast((k_ - 127) * Vectors<float>::kLn2));  // the exponent field of 2^-127 is that of zero
  }
  ACCUMLOSS_INLINE double origin() const {
    if (is_far_) return origin_;
    // n kLost of some n near k, 64 from it at most: the same for all origins that a row is likely to have
    return static_cast<double>(k_) * 0.6931471805599453 - 128 * std::nearbyint(k_ / 128) * kLost;
  }
  ACCUMLOSS_INLINE double u_origin() const { return origin_; }
  ACCUMLOSS_INLINE bool is_far() const { return is_far_; }
  // kCount of them, side by side in each step: what waits for a result waits outside of the core's schedulers.
  template <bool kClamps, int kCount, bool kIsFar>
  ACCUMLOSS_INLINE void exps(const Real* z, Real* u, Real* e) const {
    Real x[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = kIsFar ? z[k] - origin_ : z[k];
    for (int k = 0; k < kCount; ++k) x[k] = maximum(lowest_, x[k]);  // a NaN stays
    exps_of<kCount>(x, e);
    for (int k = 0; k < kCount; ++k) u[k] = kIsFar ? x[k] : x[k] - origin_;
  }
  // Of an origin that is not far: u = z - u_origin() as it is, however low.
  template <int kCount>
  ACCUMLOSS_INLINE void exps_and_differences(const Real* z, Real* u, Real* e) const {
    Real x[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = maximum(lowest_, z[k]);
    exps_of<kCount>(x, e);
    for (int k = 0; k < kCount; ++k) u[k] = z[k] - origin_;
  }
  // x: at least lowest_
  template <int kCount>
  ACCUMLOSS_INLINE void exps_of(const Real* x, Real* e) const {
    Real shifted[kCount], r[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) shifted[k] = x[k] * log2e_ + magic_;
    for (int k = 0; k < kCount; ++k) r[k] = remainder(x[k], shifted[k] - magic_);
    for (int k = 0; k < kCount; ++k) p[k] = r[k] * coefficients_[0] + coefficients_[1];
    for (int i = 2; i < 6; ++i)
      for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + coefficients_[i];
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
