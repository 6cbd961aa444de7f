// Steps over a block of at most kBlock elements, while it is in the first-level cache.
#pragma once

#include "element.h"
#include "exp.h"

namespace accumloss {
namespace cpu {
namespace {

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
ACCUMLOSS_NOINLINE void load_block(const T* x, int64_t n, Acc* buffer, int64_t ahead = kPrefetchBytes) {
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
ACCUMLOSS_NOINLINE void store_block(const Acc* buffer, int64_t n, T* x) {
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
ACCUMLOSS_NOINLINE void transform_block(Acc* buffer, int64_t n, const Transform<Acc>& transform) {
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
ACCUMLOSS_NOINLINE void multiply_by_slope(const Acc* x, int64_t n, const Transform<Acc>& transform, Acc* grad) {
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

// exps_j = exp(z_j - reference), which may be z: their sum, and sum_j exp(z_j - reference) (z_j - reference) where
// kWeighted.
template <bool kWeighted, typename Acc>
ACCUMLOSS_NOINLINE Acc sum_exps(const Acc* z, int64_t padded, Acc reference, Acc* exps, Acc* weighted) {
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
    for (int k = 0; k < kVectors; ++k) store(e[k], exps + i + k * kWidth);
  }
  if (kWeighted) *weighted = sum_lanes<Acc>(products);
  return sum_lanes<Acc>(sums);
}

// sum_j w_j (z_j - reference), j < n
template <typename Acc>
ACCUMLOSS_NOINLINE double sum_linear(const Acc* z, const Acc* weight, int64_t n, double reference) {
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
ACCUMLOSS_NOINLINE double sum_linear_wide(const T* x, double scale, const Acc* z, const Acc* weight, int64_t n,
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

// x[0] in the type of the computation, in each lane.
template <typename T>
ACCUMLOSS_INLINE typename Lanes<T>::Real load_one(const T* x) {
  T copy[Lanes<T>::kWidth];
  for (int k = 0; k < Lanes<T>::kWidth; ++k) copy[k] = *x;
  return load(copy);
}
// x[0] = value, rounded as whole vectors are.
template <typename T>
ACCUMLOSS_INLINE void store_one(typename Lanes<T>::Acc value, T* x) {
  T copy[Lanes<T>::kWidth];
  store(broadcast(value), copy);
  *x = copy[0];
}

template <typename T>
ACCUMLOSS_NOINLINE bool label_is_argmax(const void* x, int64_t V, int64_t target) {
  using Acc = typename AccOf<T>::type;
  const T* logits = static_cast<const T*>(x);
  alignas(64) Acc z[kBlock];
  const Acc label = load_one(logits + target)[0];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    load_block(logits + begin, n, z);
    for (int64_t i = 0; i < n; ++i)
      if (z[i] > label || (z[i] == label && begin + i < target)) return false;
  }
  return true;
}

// The largest of the logits as they are. NaN is not looked for.
template <typename T>
ACCUMLOSS_NOINLINE double max_logit(const void* x, int64_t V) {
  using Acc = typename AccOf<T>::type;
  alignas(64) Acc z[kBlock];
  Acc max = -std::numeric_limits<Acc>::infinity();
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    load_block(static_cast<const T*>(x) + begin, n, z);
    for (int64_t i = n; i < round_up(n, kLanes); ++i) z[i] = -std::numeric_limits<Acc>::infinity();
    const Acc of_block = max_block(z, round_up(n, kLanes));
    max = of_block > max ? of_block : max;
  }
  return max;
}

template <typename T>
ACCUMLOSS_NOINLINE int64_t first_not_below(const void* x, int64_t begin, int64_t V, double value) {
  using Acc = typename AccOf<T>::type;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  const Acc limit = static_cast<Acc>(value);
  alignas(64) Acc z[kBlock];
  for (; begin < V; begin += kBlock) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    load_block(static_cast<const T*>(x) + begin, n, z);
    typename Vectors<Acc>::Int below = broadcast(Acc(0)) == broadcast(Acc(0));
    for (int64_t i = 0; i < n; i += kWidth) below &= load(z + i) < limit;
    bool all_below = true;
    for (int k = 0; k < kWidth; ++k) all_below &= below[k] != 0;
    for (int64_t i = 0; !all_below && i < n; ++i)
      if (!(z[i] < limit)) return begin + i;
  }
  return V;
}

// exp(z - lse) with lse rounded; what the rounding took away goes into the factors.
template <typename Acc>
struct RoundedLse {
  Acc lse, probability, entropy;

  ACCUMLOSS_INLINE explicit RoundedLse(const RowGrad<double>& gradient) : lse(static_cast<Acc>(gradient.lse_high)) {
    const double lost = static_cast<double>(lse) - gradient.lse_high, factor = std::exp(lost);
    probability = static_cast<Acc>((gradient.probability - gradient.entropy * lost) * factor);
    entropy = static_cast<Acc>(gradient.entropy * factor);
  }
};

// In what follows grad points at the class row.begin.

template <typename T>
ACCUMLOSS_INLINE void set_target(const RowSegment& row, const RowGrad<double>& gradient, T* grad) {
  if (row.target < row.begin || row.target >= row.end) return;
  store_one(static_cast<typename Lanes<T>::Acc>(gradient.target), grad + (row.target - row.begin));
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

}  // namespace
}  // namespace cpu
}  // namespace accumloss
