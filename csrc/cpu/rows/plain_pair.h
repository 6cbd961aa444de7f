// Rows of two tensors side by side without options, but for a scale: logits beside a teacher's logits or beside class
// probabilities. One loop over both rows finds what a forward needs of them, lse and all; one more writes the gradient.
#pragma once

#include "plain.h"

namespace accumloss {
namespace cpu {
namespace {

enum class Teacher { kLogits, kProbabilities };

// Scaled logits are floats, and no bf16.
template <typename T, bool kScales>
using PairExp = ExpFrom<typename std::conditional<kScales && std::is_same<T, BFloat16>::value, Float16, T>::type>;

template <typename T, bool kScales>
ACCUMLOSS_INLINE void load_scaled(const T* x, typename Lanes<T>::Real scale, typename Lanes<T>::Real* v) {
  Lanes<T>::load(x, v);
  for (int k = 0; kScales && k < Lanes<T>::kVectors; ++k) v[k] *= scale;
}

// What the groups of both rows come to: of all but the maxima, those of one span.
template <typename T>
struct PlainPairSums {
  using Real = typename Lanes<T>::Real;
  PlainSums<T> student, teacher;          // of probabilities sums alone, and as they are
  Real weighted[PlainSums<T>::kVectors];  // sum_j w_j (u_j of the teacher, or 0, - u_j of the student)

  ACCUMLOSS_INLINE void clear() {
    for (int k = 0; k < PlainSums<T>::kVectors; ++k) student.sums[k] = teacher.sums[k] = weighted[k] = Real{};
  }
};

// Adds count groups of both rows. w_j: the teacher's probability, or the exponential of its logit; a class of which
// that is 0 adds nothing to the weighted sum, whatever the student's logit. See sum_groups.
template <typename T, Teacher kTeacher, bool kScales>
ACCUMLOSS_NOINLINE void sum_pairs(const T* student, const T* teacher, int64_t count, int64_t ahead,
                                  typename Lanes<T>::Acc student_reference, typename Lanes<T>::Acc teacher_reference,
                                  typename Lanes<T>::Acc scale, PlainPairSums<T>& total) {
  using Real = typename Lanes<T>::Real;
  constexpr int kVectors = Lanes<T>::kVectors;
  constexpr int kMax = PlainSums<T>::kMax;
  const PairExp<T, kScales> from_student(student_reference, Held());
  const PairExp<T, kScales> from_teacher(teacher_reference, from_student);  // neither is far
  const Real scales = broadcast(scale);
  Real student_max[kMax], teacher_max[kMax], student_sums[kVectors], teacher_sums[kVectors], weighted[kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kMax; ++k) {
    student_max[k] = total.student.max[k];
    if (kTeacher == Teacher::kLogits) teacher_max[k] = total.teacher.max[k];
  }
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) {
    student_sums[k] = total.student.sums[k];
    teacher_sums[k] = total.teacher.sums[k];
    weighted[k] = total.weighted[k];
  }
  for (; count > 0; --count, student += kLanes, teacher += kLanes) {
    Real v[kVectors], u[kVectors], e[kVectors], w[kVectors], gap[kVectors];
    prefetch(student, ahead);
    prefetch(teacher, ahead);
    load_scaled<T, kScales>(student, scales, v);
    for (int k = 0; k < kVectors; ++k) student_max[k % kMax] = maximum(v[k], student_max[k % kMax]);
    from_student.template exps_and_differences<kVectors>(v, u, e);
    for (int k = 0; k < kVectors; ++k) student_sums[k] += e[k];
    if constexpr (kTeacher == Teacher::kLogits) {
      load_scaled<T, kScales>(teacher, scales, v);
      for (int k = 0; k < kVectors; ++k) teacher_max[k % kMax] = maximum(v[k], teacher_max[k % kMax]);
      from_teacher.template exps_and_differences<kVectors>(v, gap, w);
      for (int k = 0; k < kVectors; ++k) gap[k] = gap[k] - u[k];
    } else {
      Lanes<T>::load(teacher, w);
      for (int k = 0; k < kVectors; ++k) gap[k] = -u[k];
    }
    for (int k = 0; k < kVectors; ++k) teacher_sums[k] += w[k];
    for (int k = 0; k < kVectors; ++k) gap[k] = w[k] == 0 ? Real{} : gap[k];
    for (int k = 0; k < kVectors; ++k) weighted[k] += w[k] * gap[k];
  }
#pragma GCC unroll 16
  for (int k = 0; k < kMax; ++k) {
    total.student.max[k] = student_max[k];
    if (kTeacher == Teacher::kLogits) total.teacher.max[k] = teacher_max[k];
  }
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) {
    total.student.sums[k] = student_sums[k];
    total.teacher.sums[k] = teacher_sums[k];
    total.weighted[k] = weighted[k];
  }
}

// A reference that follows the largest logit of a row, and the sum of exponentials in its units.
template <typename Exp>
struct Reference {
  using Acc = typename Exp::Acc;
  static constexpr Acc kHeadroom = 4;  // see push_plain
  Acc value = 0;
  Acc limit = -std::numeric_limits<Acc>::infinity();  // above it the value follows
  double sum = 0;                                     // in units of exp(origin())

  ACCUMLOSS_INLINE double origin() const { return Exp(value).origin(); }
  ACCUMLOSS_INLINE double u_origin() const { return Exp(value).u_origin(); }
  struct Fall {
    double u_origin = 0, factor = 1;  // how far u_origin fell; exp() of how far the origin did
  };
  // To the largest logit, or where that is -inf nowhere. The first is no fall.
  ACCUMLOSS_INLINE Fall raise(Acc largest) {
    constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
    Fall fall;
    if (largest == -kInfinity) return fall;
    const bool is_first = limit == -kInfinity;
    const double before = origin(), u_before = u_origin();
    value = largest;
    limit = largest + kHeadroom;
    if (is_first) return fall;
    fall.u_origin = u_before - u_origin();
    fall.factor = std::exp(before - origin());
    sum *= fall.factor;
    return fall;
  }
  // The whole row.
  ACCUMLOSS_INLINE RowState<double> state(Acc largest) const {
    RowState<double> state;
    state.max = largest;
    state.sum = state.max == -kInfinity ? sum : sum * std::exp(origin() - state.max);
    return state;
  }
};

// Whether it could: false where the origin of bf16 logits is far. V: of both.
template <typename T, Teacher kTeacher, bool kScales>
ACCUMLOSS_NOINLINE bool try_push_pair(const T* x, const T* other, int64_t V, double logit_scale, PairSums* found) {
  using Acc = typename AccOf<T>::type;
  using Exp = PairExp<T, kScales>;
  constexpr bool kHasLogits = kTeacher == Teacher::kLogits;
  constexpr int kMax = PlainSums<T>::kMax;
  const Acc scale = static_cast<Acc>(logit_scale);
  int64_t label = -1;  // the class of the largest probability so far: left out
  PlainPairSums<T> span;
  for (int k = 0; k < kMax; ++k)
    span.student.max[k] = span.teacher.max[k] = broadcast<Acc>(-std::numeric_limits<Acc>::infinity());
  Reference<Exp> student, teacher;
  double weighted = 0;
  const auto raise = [&] {
    const double sum_before = teacher.sum;
    const auto fall = student.raise(max_lanes<Acc, kMax>(span.student.max));
    if (kHasLogits) {
      const auto of_teacher = teacher.raise(max_lanes<Acc, kMax>(span.teacher.max));
      // Of a teacher's class that is nothing beside the new ones the student's logit may be -inf.
      weighted = of_teacher.factor < std::numeric_limits<Acc>::min()
                     ? 0
                     : (weighted + sum_before * (of_teacher.u_origin - fall.u_origin)) * of_teacher.factor;
    } else if (teacher.sum != 0) {
      weighted -= teacher.sum * fall.u_origin;
    }
    return !Exp::is_far_at(student.value) && !Exp::is_far_at(teacher.value);
  };
  const auto is_exceeded = [&] {
    return any_above<Acc, kMax>(span.student.max, student.limit) ||
           (kHasLogits && any_above<Acc, kMax>(span.teacher.max, teacher.limit));
  };
  // Whether it could. The label that another one succeeds is one of the others from then on.
  const auto find_label = [&](int64_t begin, int64_t end) {
    const int64_t whole = (end - begin) / kLanes, rest = begin + whole * kLanes;
    const Acc largest = max_lanes<Acc, kMax>(span.teacher.max);
    max_groups(other + begin, whole, span.teacher);
    if (rest < end) {
      T tail[kLanes];
      for (T& value : tail) value = negative_infinity(T{});
      std::memcpy(tail, other + rest, static_cast<size_t>(end - rest) * sizeof(T));
      max_groups(tail, 1, span.teacher);
    }
    if (label >= 0) {
      if (!any_above<Acc, kMax>(span.teacher.max, largest)) return true;
      const Acc z = load_one(x + label)[0], q = load_one(other + label)[0];
      span.student.max[0] = maximum(broadcast(z), span.student.max[0]);  // a NaN is none
      if (z > student.limit && !raise()) return false;
      student.sum += std::exp(z - student.origin());
      teacher.sum += q;
      if (q != 0) weighted -= q * (z - student.u_origin());
    }
    label = first_not_below<T>(other, begin, end, max_lanes<Acc, kMax>(span.teacher.max));
    if (label >= end) label = begin;  // all of the row so far -inf or NaN
    return true;
  };
  // work(student's, teacher's, count, ahead) for the groups of [begin, end), in runs
  const auto for_each_run = [&](int64_t begin, int64_t end, const auto& work) {
    const int64_t label_group = label >= begin ? label / kLanes * kLanes : end;
    for (int64_t i = begin; i < end;) {
      if (i == label_group || i + kLanes > end) {
        alignas(64) T z[kLanes], t[kLanes];
        const int64_t n = end - i < kLanes ? end - i : kLanes;
        for (int64_t k = n; k < kLanes; ++k) {
          z[k] = negative_infinity(T{});
          t[k] = kHasLogits ? negative_infinity(T{}) : T{};
        }
        std::memcpy(z, x + i, static_cast<size_t>(n) * sizeof(T));
        std::memcpy(t, other + i, static_cast<size_t>(n) * sizeof(T));
        if (label >= i && label < i + n) {
          z[label - i] = negative_infinity(T{});
          t[label - i] = T{};
        }
        work(z, t, 1, 0);
        i += kLanes;
      } else {
        int64_t stop = i + (end - i) / kLanes * kLanes;
        if (label_group < stop && i < label_group) stop = label_group;
        work(x + i, other + i, (stop - i) / kLanes, kPrefetchBytes);
        i = stop;
      }
    }
  };
  const auto visit = [&](int64_t begin, int64_t end) {
    span.clear();
    for_each_run(begin, end, [&](const T* z, const T* t, int64_t count, int64_t ahead) {
      sum_pairs<T, kTeacher, kScales>(z, t, count, ahead, student.value, teacher.value, scale, span);
    });
  };
  for (int64_t begin = 0; begin < V; begin += kSpan<T>) {
    const int64_t end = V - begin < kSpan<T> ? V : begin + kSpan<T>;
    if (!kHasLogits && !find_label(begin, end)) return false;
    if (begin == 0) {
      for_each_run(begin, end, [&](const T* z, const T* t, int64_t count, int64_t) {
        max_groups(z, count, span.student);
        if (kHasLogits) max_groups(t, count, span.teacher);
      });
      for (int k = 0; kScales && k < kMax; ++k) {
        span.student.max[k] *= scale;
        span.teacher.max[k] *= scale;
      }
      if (!raise()) return false;
    }
    visit(begin, end);
    if (is_exceeded()) {
      if (!raise()) return false;
      visit(begin, end);
    }
    student.sum += sum_lanes<Acc>(span.student.sums);
    teacher.sum += sum_lanes<Acc>(span.teacher.sums);
    weighted += sum_lanes<Acc>(span.weighted);
  }
  found->student = student.state(max_lanes<Acc, kMax>(span.student.max));
  found->total = teacher.sum;
  found->label = label;
  const double student_rise = row_reference(found->student.max) - student.u_origin();
  if (kHasLogits) {
    found->teacher = teacher.state(max_lanes<Acc, kMax>(span.teacher.max));
    const double teacher_max = row_reference(found->teacher.max), rise = teacher_max - teacher.u_origin();
    found->weighted = (weighted - teacher.sum * (rise - student_rise)) * std::exp(teacher.origin() - teacher_max);
  } else {
    found->weighted = weighted + (teacher.sum == 0 ? 0 : teacher.sum * student_rise);
  }
  return true;
}

template <typename T>
void push_pair(const void* student, const void* teacher, int64_t V, double scale, PairSums* found) {
  const T *const x = static_cast<const T*>(student), *const other = static_cast<const T*>(teacher);
  if (scale != 1 || !try_push_pair<T, Teacher::kLogits, false>(x, other, V, 1, found))
    try_push_pair<T, Teacher::kLogits, true>(x, other, V, scale, found);
}

template <typename T>
void push_plain_targets(const void* logits, const void* targets, int64_t V, PairSums* found) {
  const T *const x = static_cast<const T*>(logits), *const other = static_cast<const T*>(targets);
  if (!try_push_pair<T, Teacher::kProbabilities, false>(x, other, V, 1, found))
    try_push_pair<T, Teacher::kProbabilities, true>(x, other, V, 1, found);
}

// visit(x's group, other's, gradient) for the groups of [0, V); the label, or -1, gets of_label. Past the caches the
// groups are laid so that each is whole lines, and what is left at the ends is written as usual.
template <typename T, typename Visit>
ACCUMLOSS_INLINE void write_groups(const T* x, const T* other, int64_t V, int64_t label,
                                   typename Lanes<T>::Acc of_label, bool streams, T* grad, const Visit& visit) {
  using Real = typename Lanes<T>::Real;
  const auto write_copy = [&](int64_t begin, int64_t n) {
    T z[kLanes] = {}, t[kLanes] = {};
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    std::memcpy(z, x + begin, bytes);
    std::memcpy(t, other + begin, bytes);
    Real g[Lanes<T>::kVectors];
    visit(z, t, g);
    Lanes<T>::store(g, z);
    if (label >= begin && label < begin + n) store_one(of_label, z + (label - begin));
    std::memcpy(grad + begin, z, bytes);
  };
  const int64_t to_line = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(grad) % 64 / sizeof(T));
  int64_t i = !streams ? 0 : to_line < V ? to_line : V;
  if (i > 0) write_copy(0, i);
  const int64_t label_group = label >= i ? i + (label - i) / kLanes * kLanes : -1;
  while (i < V) {
    if (i == label_group || i + kLanes > V) {
      const int64_t n = V - i < kLanes ? V - i : kLanes;
      write_copy(i, n);
      i += n;
      continue;
    }
    const int64_t stop = i < label_group ? label_group : i + (V - i) / kLanes * kLanes;
    for (; i < stop; i += kLanes) {
      Real g[Lanes<T>::kVectors];
      prefetch(x + i, kPrefetchBytes);
      prefetch(other + i, kPrefetchBytes);
      visit(x + i, other + i, g);
      if (streams)
        Lanes<T>::stream(g, grad + i);
      else
        Lanes<T>::store(g, grad + i);
    }
  }
}

// g = factor * dD/dz_s of D = KL(t | s): s_j - t_j; where kReverse of KL(s | t): s_j (log s_j - log t_j - D)
template <typename T, bool kReverse, bool kScales>
ACCUMLOSS_NOINLINE void write_pair_grad(const PairRow& row, double logit_scale, double factor, bool streams, T* grad) {
  using Acc = typename Lanes<T>::Acc;
  using Real = typename Lanes<T>::Real;
  using Exp = PairExp<T, kScales>;
  constexpr int kVectors = Lanes<T>::kVectors;
  const Exp from_student(static_cast<Acc>(row.lse), Held());
  const Exp from_teacher(static_cast<Acc>(row.other_lse), from_student);
  const Real of_student = broadcast(static_cast<Acc>(factor * std::exp(from_student.origin() - row.lse)));
  const Real of_teacher = broadcast(static_cast<Acc>(factor * std::exp(from_teacher.origin() - row.other_lse)));
  // what the differences lack of log s_j - log t_j - D
  const Real rest = broadcast(static_cast<Acc>((from_student.u_origin() - row.lse) -
                                               (from_teacher.u_origin() - row.other_lse) - row.divergence));
  const Real scale = broadcast(static_cast<Acc>(logit_scale));
  write_groups<T>(static_cast<const T*>(row.x), static_cast<const T*>(row.other), row.V, -1, 0, streams, grad,
                  [&](const T* x, const T* other, Real* g) __attribute__((always_inline)) {
                    Real z[kVectors], u[kVectors], s[kVectors], t[kVectors], v[kVectors];
                    load_scaled<T, kScales>(x, scale, z);
                    from_student.template exps_and_differences<kVectors>(z, u, s);
                    load_scaled<T, kScales>(other, scale, z);
                    if constexpr (kReverse) {
                      from_teacher.template exps_and_differences<kVectors>(z, v, t);  // of t nothing is used
                      for (int k = 0; k < kVectors; ++k) {
                        const Real term = s[k] * ((u[k] - v[k]) + rest) * of_student;
                        g[k] = s[k] == 0 ? Real{} : term;
                      }
                    } else {
                      from_teacher.template exps<false, kVectors, false>(z, v, t);
                      for (int k = 0; k < kVectors; ++k) g[k] = s[k] * of_student - t[k] * of_teacher;
                    }
                  });
}

template <typename T>
void write_plain_pair_grad(const PairRow& row, double scale, double factor, bool streams, T* grad) {
  using Acc = typename AccOf<T>::type;
  const bool scales = scale != 1 || ExpFrom<T>::is_far_at(static_cast<Acc>(row.lse)) ||
                      ExpFrom<T>::is_far_at(static_cast<Acc>(row.other_lse));
  const auto write = row.beta == 0 ? (scales ? write_pair_grad<T, false, true> : write_pair_grad<T, false, false>)
                                   : (scales ? write_pair_grad<T, true, true> : write_pair_grad<T, true, false>);
  write(row, scale, factor * scale, streams, grad);
}

// g_j = factor * (C p_j - q_j), C = total + 2 z_loss lse; the label's from nll
template <typename T, typename Exp>
ACCUMLOSS_NOINLINE void write_plain_targets_grad(const TargetRow& row, double of_lse, double of_label, double factor,
                                                 bool streams, T* grad) {
  using Acc = typename Lanes<T>::Acc;
  using Real = typename Lanes<T>::Real;
  constexpr int kVectors = Lanes<T>::kVectors;
  const Exp exp_from(static_cast<Acc>(row.lse), Held());
  const Real f = broadcast(static_cast<Acc>(factor));
  const Real probability = broadcast(static_cast<Acc>((row.total + of_lse) * std::exp(exp_from.origin() - row.lse)));
  write_groups<T>(static_cast<const T*>(row.x), static_cast<const T*>(row.targets), row.V, row.label,
                  static_cast<Acc>(factor * of_label), streams, grad,
                  [&](const T* x, const T* targets, Real* g) __attribute__((always_inline)) {
                    Real z[kVectors], u[kVectors], p[kVectors], q[kVectors];
                    Lanes<T>::load(x, z);
                    Lanes<T>::load(targets, q);
                    exp_from.template exps<false, kVectors, false>(z, u, p);
                    for (int k = 0; k < kVectors; ++k) g[k] = (p[k] * probability - q[k]) * f;
                  });
}

}  // namespace
}  // namespace cpu
}  // namespace accumloss
