// Rows of two tensors side by side, block by block, each step over all of a block: divergences from a mixture, and
// cross-entropies against class probabilities with any options. The lse are known.
#pragma once

#include "plain_pair.h"

namespace accumloss {
namespace cpu {
namespace {

// log p_j = z_j - lse, lse in two pieces.
template <typename Acc>
struct LogProbs {
  using Real = typename Vectors<Acc>::Real;
  Real high, low;

  ACCUMLOSS_INLINE explicit LogProbs(double lse) {
    const Acc rounded = static_cast<Acc>(lse);
    high = broadcast(rounded);
    low = broadcast(static_cast<Acc>(static_cast<double>(rounded) - lse));
  }
  ACCUMLOSS_INLINE Real operator()(Real z) const { return (z - high) + low; }
};

// e = exp(x) of kCount vectors, side by side in each step.
template <typename Acc, int kCount>
ACCUMLOSS_INLINE void exps(const typename Vectors<Acc>::Real* x, typename Vectors<Acc>::Real* e) {
  using T = typename std::conditional<sizeof(Acc) == 4, Float16, double>::type;  // of which nothing is recovered
  typename Vectors<Acc>::Real d[kCount];
  exps_of_differences<T, Acc, kCount>(x, typename Vectors<Acc>::Real{}, d, e);
}

// 1 / n!
struct InverseFactorials {
  double of[18];
  constexpr InverseFactorials() : of() {
    of[0] = 1;
    for (int n = 1; n < 18; ++n) of[n] = of[n - 1] / n;
  }
};

// expm1(-v) for v >= 0, from w = exp(-v)
template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real expm1_of_minus(typename Vectors<Acc>::Real v,
                                                            typename Vectors<Acc>::Real w) {
  using Real = typename Vectors<Acc>::Real;
  constexpr int kTerms = sizeof(Acc) == 4 ? 8 : 16;  // of the series sum_n r^n / (n + 1)!, for v < 0.5
  static constexpr InverseFactorials kCoefficients{};
  const Real r = -v;
  Real series = broadcast(static_cast<Acc>(kCoefficients.of[kTerms]));
  for (int n = kTerms - 1; n > 0; --n) series = series * r + static_cast<Acc>(kCoefficients.of[n]);
  return v < Acc(0.5) ? series * r : w - Acc(1);
}

// log1p(x) for x > -1
ACCUMLOSS_INLINE Vectors<float>::Real log1p_of(Vectors<float>::Real x) { return vector_log1p(x); }
ACCUMLOSS_INLINE Vectors<double>::Real log1p_of(Vectors<double>::Real x) {
  Vectors<double>::Real result = {};
  for (int i = 0; i < Vectors<double>::kWidth; ++i) result[i] = std::log1p(x[i]);
  return result;
}

// log s_j - log m_j and log t_j - log m_j for m = (1 - beta) s + beta t, from both and their logarithms; anything where
// both are 0. The larger of the two is taken out of the mixture, so that no difference loses digits.
template <typename Acc>
struct FromMixture {
  using Real = typename Vectors<Acc>::Real;
  Real student, teacher;

  ACCUMLOSS_INLINE FromMixture(Real log_s, Real log_t, Real s, Real t, Acc beta) {
    const Real u = log_t - log_s;
    const auto teacher_leads = u > 0;
    const Real v = teacher_leads ? u : -u, w = (teacher_leads ? s : t) / (teacher_leads ? t : s);
    const Real of_other = teacher_leads ? broadcast(Acc(1) - beta) : broadcast(beta);
    const Real l = log1p_of(of_other * expm1_of_minus<Acc>(v, w));  // log m - the larger
    const Real rest = -(v + l);
    student = teacher_leads ? rest : -l;
    teacher = teacher_leads ? -l : rest;
  }
};

// z of a block, -inf past its end.
template <typename T, typename Acc>
ACCUMLOSS_INLINE void load_transformed(const T* x, int64_t n, const Transform<Acc>& transform, Acc* z) {
  const int64_t padded = round_up(n, kLanes);
  load_block(x, n, z);
  if (!transform.is_identity()) transform_block(z, padded, transform);
  for (int64_t i = n; i < padded; ++i) z[i] = -std::numeric_limits<Acc>::infinity();
}

// of_student += sum_j s_j (log s_j - log m_j), of_teacher += sum_j t_j (log t_j - log m_j)
template <typename Acc>
ACCUMLOSS_NOINLINE void add_divergences(const Acc* zs, const Acc* zt, int64_t padded, const PairRow& row,
                                        double* of_student, double* of_teacher) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  constexpr int kVectors = kLanes / kWidth;
  using Real = typename Vectors<Acc>::Real;
  const LogProbs<Acc> log_s(row.lse), log_t(row.other_lse);
  const Acc beta = static_cast<Acc>(row.beta);
  Real students[kVectors] = {}, teachers[kVectors] = {};
  constexpr int kStep = kVectors < 4 ? kVectors : 4;
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int part = 0; part < kVectors; part += kStep) {
      Real ls[kStep], lt[kStep], s[kStep], t[kStep];
      for (int k = 0; k < kStep; ++k) ls[k] = log_s(load(zs + i + (part + k) * kWidth));
      for (int k = 0; k < kStep; ++k) lt[k] = log_t(load(zt + i + (part + k) * kWidth));
      exps<Acc, kStep>(ls, s);
      exps<Acc, kStep>(lt, t);
      // a class of probability 0 adds nothing, whatever its logarithm
      for (int k = 0; k < kStep; ++k) {
        const FromMixture<Acc> from_m(ls[k], lt[k], s[k], t[k], beta);
        const Real of_s = s[k] * from_m.student, of_t = t[k] * from_m.teacher;
        students[part + k] += s[k] == 0 ? Real{} : of_s;
        teachers[part + k] += t[k] == 0 ? Real{} : of_t;
      }
    }
  *of_teacher += sum_lanes<Acc>(teachers);
  *of_student += sum_lanes<Acc>(students);
}

// g = factor * dD/dz_s: s_j (log s_j - log m_j - KL(s | m)) times 1 - beta
template <typename Acc>
ACCUMLOSS_NOINLINE void divergence_grads(const Acc* zs, const Acc* zt, int64_t padded, const PairRow& row,
                                         double factor, Acc* g) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  using Real = typename Vectors<Acc>::Real;
  const LogProbs<Acc> log_s(row.lse), log_t(row.other_lse);
  const Acc beta = static_cast<Acc>(row.beta), divergence = static_cast<Acc>(row.divergence);
  const Acc f = static_cast<Acc>(factor * (1 - row.beta));
  constexpr int kStep = kLanes / kWidth < 4 ? kLanes / kWidth : 4;
  for (int64_t i = 0; i < padded; i += kStep * kWidth) {
    Real ls[kStep], lt[kStep], s[kStep], t[kStep];
    for (int k = 0; k < kStep; ++k) ls[k] = log_s(load(zs + i + k * kWidth));
    for (int k = 0; k < kStep; ++k) lt[k] = log_t(load(zt + i + k * kWidth));
    exps<Acc, kStep>(ls, s);
    exps<Acc, kStep>(lt, t);
    for (int k = 0; k < kStep; ++k) {
      const Real term = s[k] * (FromMixture<Acc>(ls[k], lt[k], s[k], t[k], beta).student - divergence);
      const Real value = s[k] == 0 ? Real{} : term;
      store(value * f, g + i + k * kWidth);
    }
  }
}

template <typename T>
void push_divergence(const PairRow& row, const LossOptions& options, double* of_student, double* of_teacher) {
  using Acc = typename AccOf<T>::type;
  const Transform<Acc> transform(options);
  alignas(64) Acc zs[kBlock], zt[kBlock];
  *of_student = *of_teacher = 0;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock;
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, zs);
    load_transformed(static_cast<const T*>(row.other) + begin, n, transform, zt);
    add_divergences(zs, zt, round_up(n, kLanes), row, of_student, of_teacher);
  }
}

template <typename T>
void write_divergence_grad(const PairRow& row, const LossOptions& options, double factor, bool streams, void* grad) {
  using Acc = typename AccOf<T>::type;
  if (row.beta == 0 || row.beta == 1)
    return write_plain_pair_grad<T>(row, options.logit_scale, factor, streams, static_cast<T*>(grad));
  const Transform<Acc> transform(options);
  alignas(64) Acc zs[kBlock], zt[kBlock], g[kBlock];
  alignas(64) T staged[kBlock];
  T* const to = static_cast<T*>(grad);
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock;
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, zs);
    load_transformed(static_cast<const T*>(row.other) + begin, n, transform, zt);
    divergence_grads(zs, zt, round_up(n, kLanes), row, factor * options.logit_scale, g);
    store_block(g, n, streams ? staged : to + begin);
    if (streams) stream(staged, n, to + begin);
  }
}

// w_j q_j of a block, 0 past its end.
template <typename T>
ACCUMLOSS_NOINLINE void load_targets(const TargetRow& row, const LossOptions& options, int64_t begin, int64_t n,
                                     typename AccOf<T>::type* q) {
  using Acc = typename AccOf<T>::type;
  load_block(static_cast<const T*>(row.targets) + begin, n, q);
  if (options.label_smoothing > 0) {
    const Acc hard = static_cast<Acc>(1 - options.label_smoothing);
    const Acc share = static_cast<Acc>(options.label_smoothing / static_cast<double>(row.V));
    for (int64_t i = 0; i < n; ++i) q[i] = q[i] * hard + share;
  }
  if (row.weight != nullptr) {
    const Acc* const weight = static_cast<const Acc*>(row.weight) + begin;
    for (int64_t i = 0; i < n; ++i) q[i] *= weight[i];
  }
  for (int64_t i = n; i < round_up(n, kLanes); ++i) q[i] = 0;
}

// What the targets of a row come to, the label aside: sum_j w_j q_j (lse - z_j) of the others; and of all their weight.
// q_j: (1 - label_smoothing) times the target, plus label_smoothing / V
template <typename T>
void push_targets(const TargetRow& row, const LossOptions& options, double* surprise, double* total, double* of_label) {
  using Acc = typename AccOf<T>::type;
  using Real = typename Vectors<Acc>::Real;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  const Transform<Acc> transform(options);
  const LogProbs<Acc> log_p(row.lse);
  alignas(64) Acc z[kBlock], q[kBlock];
  *surprise = *total = *of_label = 0;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock;
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, z);
    load_targets<T>(row, options, begin, n, q);
    if (row.label >= begin && row.label < begin + n) {
      *of_label = q[row.label - begin];
      q[row.label - begin] = 0;
    }
    Real sums[kLanes / kWidth] = {}, totals[kLanes / kWidth] = {};
    for (int64_t i = 0; i < round_up(n, kLanes); i += kLanes)
      for (int k = 0; k < kLanes / kWidth; ++k) {
        const Real target = load(q + i + k * kWidth), term = target * log_p(load(z + i + k * kWidth));
        totals[k] += target;
        sums[k] += target == 0 ? Real{} : term;
      }
    *surprise -= sum_lanes<Acc>(sums);
    *total += sum_lanes<Acc>(totals);
  }
  *total += *of_label;
}

// g_j = grad * (C p_j - w_j q_j) times the slope, C = total + 2 z_loss lse; the label's from nll
template <typename T>
void write_targets_grad(const TargetRow& row, const LossOptions& options, double factor, bool streams, void* grad) {
  using Acc = typename AccOf<T>::type;
  using Real = typename Vectors<Acc>::Real;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  const double of_lse = 2 * options.z_loss * row.lse;
  const double of_label = row.total * std::expm1(-row.nll) + (row.total - row.of_label) + of_lse * std::exp(-row.nll);
  if (is_plain(options) && row.weight == nullptr)
    return (ExpFrom<T>::is_far_at(static_cast<Acc>(row.lse))
                ? write_plain_targets_grad<T, PairExp<T, true>>
                : write_plain_targets_grad<T, ExpFrom<T>>)(row, of_lse, of_label, factor, streams,
                                                           static_cast<T*>(grad));
  const Transform<Acc> transform(options);
  const LogProbs<Acc> log_p(row.lse);
  const Acc f = static_cast<Acc>(factor), probability = static_cast<Acc>(row.total + of_lse);
  alignas(64) Acc z[kBlock], q[kBlock], g[kBlock];
  alignas(64) T staged[kBlock];
  T* const to = static_cast<T*>(grad);
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock, padded = round_up(n, kLanes);
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, z);
    load_targets<T>(row, options, begin, n, q);
    constexpr int kStep = kLanes / kWidth < 4 ? kLanes / kWidth : 4;
    for (int64_t i = 0; i < padded; i += kStep * kWidth) {
      Real l[kStep], p[kStep];
      for (int k = 0; k < kStep; ++k) l[k] = log_p(load(z + i + k * kWidth));
      exps<Acc, kStep>(l, p);
      for (int k = 0; k < kStep; ++k) store((p[k] * probability - load(q + i + k * kWidth)) * f, g + i + k * kWidth);
    }
    if (row.label >= begin && row.label < begin + n) g[row.label - begin] = static_cast<Acc>(factor * of_label);
    if (!transform.is_identity()) {
      load_block(static_cast<const T*>(row.x) + begin, n, z);
      multiply_by_slope(z, padded, transform, g);
    }
    store_block(g, n, streams ? staged : to + begin);
    if (streams) stream(staged, n, to + begin);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace accumloss
