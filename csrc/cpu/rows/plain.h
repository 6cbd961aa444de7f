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

}  // namespace
}  // namespace cpu
}  // namespace accumloss
