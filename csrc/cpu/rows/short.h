// Rows of at most kMedium classes, kGroup at a time: what is done once for a row is done for a vector of rows.
#pragma once

#include "block.h"

namespace accumloss {
namespace cpu {
namespace {

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

ACCUMLOSS_INLINE void begin_group(ShortRows& __restrict rows, GroupSums& __restrict group) {
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
ACCUMLOSS_NOINLINE void finish_group(ShortRows& __restrict rows, bool metrics, GroupSums& __restrict group) {
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
    lost = gap == -kInfinity ? Real{} : lost;  // of finite ones too, which are further apart than the largest number
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
    for (int k = 0; k < kVectors / 2; ++k) work(j + k * kWidth, k, std::true_type());
    if (stride - j == kLanes)
      for (int k = kVectors / 2; k < kVectors; ++k) work(j + k * kWidth, k, std::true_type());
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
    if constexpr (kStep > 2 * kHalf) {
      if (stride - j == 3 * kHalf) visit(j, Count<3 * kHalf / kWidth>());
      if (stride - j == 2 * kHalf) visit(j, Count<2 * kHalf / kWidth>());
    }
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

}  // namespace
}  // namespace cpu
}  // namespace accumloss
