// Rows of two tensors side by side, block by block, each step over all of a block: divergences of a student from a
// teacher, and cross-entropies against class probabilities. Both rows have been reduced to their lse before.
#pragma once

#include "block.h"

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

// exp(x), x unchanged
template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real exp_of(typename Vectors<Acc>::Real x) {
  return exp_clamped<Acc>(x);
}

// expm1(-v) for v >= 0; infinity is -1
template <typename Acc>
ACCUMLOSS_INLINE typename Vectors<Acc>::Real expm1_of_minus(typename Vectors<Acc>::Real v) {
  using Real = typename Vectors<Acc>::Real;
  constexpr int kTerms = sizeof(Acc) == 4 ? 9 : 16;  // of the series, for v < 0.5
  const Real whole = exp_of<Acc>(-v) - Acc(1);
  const Real r = v < Acc(0.5) ? -v : Real{};
  Real series = broadcast(Acc(1));
  for (int n = kTerms; n > 1; --n) series = series * r * (Acc(1) / Acc(n)) + Acc(1);
  return v < Acc(0.5) ? series * r : whole;
}

// log1p(x) for x > -1
ACCUMLOSS_INLINE Vectors<float>::Real log1p_of(Vectors<float>::Real x) { return vector_log1p(x); }
ACCUMLOSS_INLINE Vectors<double>::Real log1p_of(Vectors<double>::Real x) {
  Vectors<double>::Real result = {};
  for (int i = 0; i < Vectors<double>::kWidth; ++i) result[i] = std::log1p(x[i]);
  return result;
}

enum class Mixture {
  kTeacher,
  kStudent,
  kBoth
};  // beta 0: KL(t | s); beta 1: KL(s | t); else of both from their mixture

// log s_j - log m_j and log t_j - log m_j for m = (1 - beta) s + beta t, from log s_j and log t_j; anything where both
// probabilities are 0. The larger of the two is taken out of the mixture, so that no difference loses digits.
template <typename Acc>
struct FromMixture {
  using Real = typename Vectors<Acc>::Real;
  Real student, teacher;

  ACCUMLOSS_INLINE FromMixture(Real log_s, Real log_t, Acc beta) {
    const Real u = log_t - log_s;
    const auto student_leads = !(u > 0);
    const Real v = student_leads ? -u : u;
    const Real of_other = student_leads ? broadcast(beta) : broadcast(Acc(1) - beta);
    const Real l = log1p_of(of_other * expm1_of_minus<Acc>(v));  // log m - the larger
    student = student_leads ? -l : -(v + l);
    teacher = student_leads ? -(v + l) : -l;
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
template <Mixture kMixture, typename Acc>
ACCUMLOSS_NOINLINE void add_divergences(const Acc* zs, const Acc* zt, int64_t padded, const PairRow& row,
                                        double* of_student, double* of_teacher) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  constexpr int kVectors = kLanes / kWidth;
  using Real = typename Vectors<Acc>::Real;
  const LogProbs<Acc> log_s(row.lse), log_t(row.other_lse);
  const Acc beta = static_cast<Acc>(row.beta);
  Real students[kVectors] = {}, teachers[kVectors] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int k = 0; k < kVectors; ++k) {
      const Real ls = log_s(load(zs + i + k * kWidth)), lt = log_t(load(zt + i + k * kWidth));
      // a class of probability 0 adds nothing, whatever its logarithm
      if constexpr (kMixture != Mixture::kStudent) {
        const Real t = exp_of<Acc>(lt);
        const Real term = kMixture == Mixture::kTeacher ? t * (lt - ls) : t * FromMixture<Acc>(ls, lt, beta).teacher;
        teachers[k] += t == 0 ? Real{} : term;
      }
      if constexpr (kMixture != Mixture::kTeacher) {
        const Real s = exp_of<Acc>(ls);
        const Real term = kMixture == Mixture::kStudent ? s * (ls - lt) : s * FromMixture<Acc>(ls, lt, beta).student;
        students[k] += s == 0 ? Real{} : term;
      }
    }
  if (kMixture != Mixture::kStudent) *of_teacher += sum_lanes<Acc>(teachers);
  if (kMixture != Mixture::kTeacher) *of_student += sum_lanes<Acc>(students);
}

// g = factor * dD/dz_s: s_j (log s_j - log m_j - KL(s | m)) times (1 - beta); beta 0: s_j - t_j
template <Mixture kMixture, typename Acc>
ACCUMLOSS_NOINLINE void divergence_grads(const Acc* zs, const Acc* zt, int64_t padded, const PairRow& row,
                                         double factor, Acc* g) {
  constexpr int kWidth = Vectors<Acc>::kWidth;
  using Real = typename Vectors<Acc>::Real;
  const LogProbs<Acc> log_s(row.lse), log_t(row.other_lse);
  const Acc beta = static_cast<Acc>(row.beta), divergence = static_cast<Acc>(row.divergence);
  const Acc f = static_cast<Acc>(kMixture == Mixture::kBoth ? factor * (1 - row.beta) : factor);
  for (int64_t i = 0; i < padded; i += kWidth) {
    const Real ls = log_s(load(zs + i)), lt = log_t(load(zt + i));
    const Real s = exp_of<Acc>(ls);
    if constexpr (kMixture == Mixture::kTeacher) {
      store((s - exp_of<Acc>(lt)) * f, g + i);
    } else {
      const Real from_m = kMixture == Mixture::kStudent ? ls - lt : FromMixture<Acc>(ls, lt, beta).student;
      store((s == 0 ? Real{} : s * (from_m - divergence)) * f, g + i);
    }
  }
}

template <typename T>
void push_divergence(const PairRow& row, const LossOptions& options, double* of_student, double* of_teacher) {
  using Acc = typename AccOf<T>::type;
  const Transform<Acc> transform(options);
  alignas(64) Acc zs[kBlock], zt[kBlock];
  *of_student = *of_teacher = 0;
  const auto add = row.beta == 0   ? add_divergences<Mixture::kTeacher, Acc>
                   : row.beta == 1 ? add_divergences<Mixture::kStudent, Acc>
                                   : add_divergences<Mixture::kBoth, Acc>;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock;
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, zs);
    load_transformed(static_cast<const T*>(row.other) + begin, n, transform, zt);
    add(zs, zt, round_up(n, kLanes), row, of_student, of_teacher);
  }
}

template <typename T>
void write_divergence_grad(const PairRow& row, const LossOptions& options, double factor, bool streams, void* grad) {
  using Acc = typename AccOf<T>::type;
  const Transform<Acc> transform(options);
  alignas(64) Acc zs[kBlock], zt[kBlock], g[kBlock];
  alignas(64) T staged[kBlock];
  const auto write = row.beta == 0   ? divergence_grads<Mixture::kTeacher, Acc>
                     : row.beta == 1 ? divergence_grads<Mixture::kStudent, Acc>
                                     : divergence_grads<Mixture::kBoth, Acc>;
  T* const to = static_cast<T*>(grad);
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock;
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, zs);
    load_transformed(static_cast<const T*>(row.other) + begin, n, transform, zt);
    write(zs, zt, round_up(n, kLanes), row, factor * options.logit_scale, g);
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
  const Transform<Acc> transform(options);
  const LogProbs<Acc> log_p(row.lse);
  const double of_lse = 2 * options.z_loss * row.lse;
  const Acc f = static_cast<Acc>(factor), probability = static_cast<Acc>(row.total + of_lse);
  const double of_label = row.total * std::expm1(-row.nll) + (row.total - row.of_label) + of_lse * std::exp(-row.nll);
  alignas(64) Acc z[kBlock], q[kBlock], g[kBlock];
  alignas(64) T staged[kBlock];
  T* const to = static_cast<T*>(grad);
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t n = row.V - begin < kBlock ? row.V - begin : kBlock, padded = round_up(n, kLanes);
    load_transformed(static_cast<const T*>(row.x) + begin, n, transform, z);
    load_targets<T>(row, options, begin, n, q);
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Real p = exp_of<Acc>(log_p(load(z + i)));
      store((p * probability - load(q + i)) * f, g + i);
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
