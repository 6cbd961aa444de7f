// Rows without transform and smoothing: one loop loads, compares, exponentiates and sums; the exponentials stay in the
// lanes of Group.
#pragma once

#include "block.h"

namespace accumloss {
namespace cpu {
namespace {

// How many groups go through a loop at once: their chains of dependent instructions side by side, in 32 registers.
template <typename T>
constexpr int kGroupsAtOnce = kVectorBytes == 64 && std::is_same<T, BFloat16>::value ? 2 : 1;
// Logits whose exponentials are summed up in float, and have one reference. bf16 keeps 8 bits: two blocks.
template <typename T>
constexpr int64_t kSpan = std::is_same<T, BFloat16>::value ? 2 * kBlock : kBlock;
template <int kCount>
using Count = std::integral_constant<int, kCount>;

// copy = the classes [group, group + kLanes), with -inf for the label, before the begin and past the end.
template <typename T>
ACCUMLOSS_NOINLINE void copy_masked(const RowSegment& row, int64_t group, T* copy) {
  const int64_t begin = row.begin > group ? row.begin : group;
  const int64_t end = row.end - group < kLanes ? row.end : group + kLanes;
  for (int64_t i = 0; i < kLanes; ++i) copy[i] = negative_infinity(T{});
  std::memcpy(copy + (begin - group), static_cast<const T*>(row.x) + begin,
              static_cast<size_t>(end - begin) * sizeof(T));
  if (row.target >= begin && row.target < end) copy[row.target - group] = negative_infinity(T{});
}

// What the groups of a row come to: of sums and products, those of one span.
template <typename T>
struct PlainSums {
  using Real = typename Lanes<T>::Real;
  static constexpr int kVectors = Lanes<T>::kVectors;
  static constexpr int kMax = 2;  // as many chains as the loop has room for; a maximum does not depend on their number
  Real max[kMax], sums[kVectors], products[kVectors];
};

// Adds the exponentials of count groups, and where kWeighted their products with the logits; stores the exponentials
// where kStores. The product is 0 at -inf where kClamps or ExpFrom<T>::kClampsAlways, else NaN. A function of its own,
// so that the registers are this loop's; unrolled where it comes and goes, or GCC copies the sums in pieces that the
// loads after them have to wait for.
template <typename T, bool kWeighted, bool kStores, bool kClamps>
ACCUMLOSS_NOINLINE void sum_groups(const T* from, typename Lanes<T>::Acc* to, int64_t count, int64_t ahead,
                                   typename Lanes<T>::Acc reference, PlainSums<T>& total) {
  using Real = typename Lanes<T>::Real;
  constexpr int kVectors = Lanes<T>::kVectors;
  constexpr int kStep = kGroupsAtOnce<T>;
  const ExpFrom<T> exp_from(reference, Held());
  constexpr int kMax = PlainSums<T>::kMax;
  Real max[kMax], sums[kVectors], products[kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kMax; ++k) max[k] = total.max[k];
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) {
    sums[k] = total.sums[k];
    if (kWeighted) products[k] = total.products[k];
  }
  const auto visit = [&](auto groups, auto is_far) __attribute__((always_inline)) {
    constexpr int kCount = decltype(groups)::value * kVectors;
    Real v[kCount], u[kCount], e[kCount];
    for (int g = 0; g < kCount / kVectors; ++g) {
      prefetch(from + g * kLanes, ahead);
      Lanes<T>::load(from + g * kLanes, v + g * kVectors);
    }
    for (int k = 0; k < kCount; ++k) max[k % kMax] = maximum(v[k], max[k % kMax]);
    exp_from.template exps<kClamps, kCount, decltype(is_far)::value>(v, u, e);
    for (int k = 0; k < kCount; ++k) {
      sums[k % kVectors] += e[k];
      if (kWeighted) products[k % kVectors] += e[k] * u[k];
      if (kStores) store(e[k], to + k * Lanes<T>::kWidth);
    }
    from += kCount / kVectors * kLanes;
    if (kStores) to += kCount / kVectors * kLanes;
  };
  if (exp_from.is_far())
    for (; count > 0; --count) visit(Count<1>(), std::true_type());
  if constexpr (kStep > 1) {
    for (; count >= kStep; count -= kStep) visit(Count<kStep>(), std::false_type());
  }
  for (; count > 0; --count) visit(Count<1>(), std::false_type());
#pragma GCC unroll 16
  for (int k = 0; k < kMax; ++k) total.max[k] = max[k];
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) {
    total.sums[k] = sums[k];
    if (kWeighted) total.products[k] = products[k];
  }
}

template <typename T>
ACCUMLOSS_NOINLINE void max_groups(const T* from, int64_t count, PlainSums<T>& total) {
  using Real = typename Lanes<T>::Real;
  constexpr int kVectors = Lanes<T>::kVectors;
  constexpr int kMax = PlainSums<T>::kMax;
  Real max[kMax];
#pragma GCC unroll 16
  for (int k = 0; k < kMax; ++k) max[k] = total.max[k];
  for (const T* const end = from + count * kLanes; from < end; from += kLanes) {
    Real v[kVectors];
    Lanes<T>::load(from, v);
    for (int k = 0; k < kVectors; ++k) max[k % kMax] = maximum(v[k], max[k % kMax]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kMax; ++k) total.max[k] = max[k];
}

// work(logits, exponentials, count, ahead, is_copy) for the groups of [begin, end), in runs; begin may be that of a
// group that the row begins in. A group that was copied has -inf in it, for the label and outside of the row. exps: at
// class 0, or null; where they may take the place of the logits they end with the row.
template <typename T, typename Acc, typename Work>
ACCUMLOSS_INLINE void for_each_run(const RowSegment& row, int64_t begin, int64_t end, Acc* exps, const Work& work) {
  constexpr bool kMayBeLogits = std::is_same<T, Acc>::value;
  const int64_t target_group = row.target / kLanes * kLanes;
  alignas(64) T copy[kLanes];
  alignas(64) Acc rest[kLanes];
  for (int64_t i = begin; i < end;) {
    Acc* const to = exps != nullptr ? exps + i : nullptr;
    if (i == target_group || i < row.begin || i + kLanes > end) {
      copy_masked(row, i, copy);
      const bool is_apart = kMayBeLogits && i + kLanes > end;
      work(copy, is_apart ? rest : to, 1, 0, true);
      if (is_apart && to != nullptr) std::memcpy(to, rest, static_cast<size_t>(end - i) * sizeof(Acc));
      i += kLanes;
    } else {
      int64_t stop = i + (end - i) / kLanes * kLanes;
      if (i < target_group && target_group < stop) stop = target_group;
      if (i < row.turn && row.turn < stop) stop = row.turn;
      work(static_cast<const T*>(row.x) + i, to, (stop - i) / kLanes, row.ahead(i), false);
      i = stop;
    }
  }
}

template <typename T>
void push_plain(const RowSegment& row, bool metrics, RowState<double>* state, typename AccOf<T>::type* exps,
                typename AccOf<T>::type* references) {
  using Acc = typename AccOf<T>::type;
  using Real = typename Lanes<T>::Real;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  constexpr bool kClampsAlways = ExpFrom<T>::kClampsAlways;
  constexpr Acc kHeadroom = 4;  // a block may exceed its reference by so much: sums stay far from overflow
  // Where the exponentials do take the place of the logits, a span is visited once: its logits are gone after.
  const bool stores = exps != nullptr, is_over_logits = static_cast<const void*>(exps) == row.x;
  const auto add = metrics
                       ? (stores ? sum_groups<T, true, true, kClampsAlways> : sum_groups<T, true, false, kClampsAlways>)
                       : (stores ? sum_groups<T, false, true, false> : sum_groups<T, false, false, false>);
  const auto add_clamped = !metrics ? add : stores ? sum_groups<T, true, true, true> : sum_groups<T, true, false, true>;

  PlainSums<T> span;
  for (Real& max : span.max) max = broadcast<Acc>(-kInfinity);
  Acc reference = 0;
  bool has_reference = false;    // not while all logits are -inf
  double sum = 0, weighted = 0;  // in units of exp(origin), weighted about u_origin
  const auto origin = [&] { return ExpFrom<T>(reference).origin(); };
  const auto u_origin = [&] { return ExpFrom<T>(reference).u_origin(); };
  const auto raise_reference = [&] {
    const Acc largest = max_lanes<Acc, PlainSums<T>::kMax>(span.max);
    if (largest == -kInfinity) return;  // any finite reference makes every exponential zero
    const double before = origin(), u_before = u_origin();
    reference = largest;
    has_reference = true;
    if (sum == 0) return;
    const double factor = std::exp(before - origin());
    weighted = factor == 0 ? 0 : (weighted + sum * (u_before - u_origin())) * factor;  // of doubles that far below it
                                                                                       // may be infinite
    sum *= factor;
  };
  const auto visit = [&](int64_t begin, int64_t end, bool clamps) {
    for (Real& zero : span.sums) zero = Real{};
    for (Real& zero : span.products) zero = Real{};
    for_each_run<T>(row, begin, end, exps, [&](const T* from, Acc* to, int64_t count, int64_t ahead, bool is_copy) {
      (clamps || is_copy ? add_clamped : add)(from, to, count, ahead, reference, span);
    });
  };

  // spans and groups are those of the whole row wherever a shard of it begins
  for (int64_t begin = row.begin / kLanes * kLanes, end; begin < row.end; begin = end) {
    end = (begin / kSpan<T> + 1) * kSpan<T>;
    if (row.end < end) end = row.end;
    if (!has_reference || is_over_logits) {
      for_each_run<T, Acc>(row, begin, end, nullptr,
                           [&](const T* from, Acc*, int64_t count, int64_t, bool) { max_groups(from, count, span); });
      if (!has_reference || any_above<Acc, PlainSums<T>::kMax>(span.max, reference + kHeadroom)) raise_reference();
    }
    visit(begin, end, false);
    if (any_above<Acc, PlainSums<T>::kMax>(span.max, reference + kHeadroom)) {
      const Acc before = reference;
      raise_reference();
      if (reference != before) visit(begin, end, false);
    }
    if (metrics) {
      Acc products = sum_lanes<Acc>(span.products);
      if (!kClampsAlways && products != products) {  // 0 * -inf, of a masked class
        visit(begin, end, true);
        products = sum_lanes<Acc>(span.products);
      }
      weighted += products;
    }
    if (stores) references[begin / kBlock] = has_reference ? reference : -kInfinity;  // whose factor is 0 then
    sum += sum_lanes<Acc>(span.sums);
  }
  state->max = max_lanes<Acc, PlainSums<T>::kMax>(span.max);
  const double factor = state->max == -kInfinity ? 1.0 : std::exp(origin() - state->max);
  state->sum = sum * factor;  // a NaN stays one where every other logit is -inf
  state->weighted = (weighted + sum * (u_origin() - row.reference)) * factor;
}

template <typename T>
void write_grad_plain(const RowSegment& row, const RowGrad<double>& gradient, T* grad) {
  using Acc = typename AccOf<T>::type;
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  constexpr int kVectors = Lanes<T>::kVectors;
  const T* x = static_cast<const T*>(row.x);
  const ExpFrom<T> exp_from(static_cast<Acc>(gradient.lse_high), Held());
  const Acc probability = static_cast<Acc>(gradient.probability * std::exp(exp_from.origin() - gradient.lse_high));
  const auto write = [&](auto is_far) __attribute__((always_inline)) {
    const auto visit = [&](const T* from, T* to) __attribute__((always_inline)) {
      Real v[kVectors];
      Lanes<T>::load(from, v);
      Real u[kVectors], e[kVectors];
      exp_from.template exps<false, kVectors, decltype(is_far)::value>(v, u, e);
      for (int k = 0; k < kVectors; ++k) v[k] = e[k] * probability;
      Lanes<T>::store(v, to);
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
  };
  if (exp_from.is_far())
    write(std::true_type());
  else
    write(std::false_type());
  set_target(row, gradient, grad);
}

template <typename T>
void write_grad_from_exps_plain(const RowSegment& row, const RowGrad<double>& gradient,
                                const typename AccOf<T>::type* exps, const typename AccOf<T>::type* references,
                                T* grad) {
  using Acc = typename AccOf<T>::type;
  using V = Vectors<Acc>;
  using Real = typename V::Real;
  constexpr int kVectors = Lanes<T>::kVectors;
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
      Lanes<T>::store(v, to);
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

}  // namespace
}  // namespace cpu
}  // namespace accumloss
