// Rows with any option, block by block, each step over all of a block.
#pragma once

#include "block.h"

namespace accumloss {
namespace cpu {
namespace {

template <typename T>
void push_general(const RowSegment& row, const LossOptions& options, RowState<double>* state,
                  typename AccOf<T>::type* exps, typename AccOf<T>::type* references) {
  using Acc = typename AccOf<T>::type;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
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
    if (exps != nullptr) references[begin / kBlock] = static_cast<Acc>(state->max);  // of -inf the factor is 0
    Acc* const e = exps != nullptr ? exps + begin : z;
    Acc weighted = 0;
    const Acc sum = options.metrics ? sum_exps<true>(z, padded, reference, e, &weighted)
                                    : sum_exps<false>(z, padded, reference, e, &weighted);
    state->sum += sum;
    state->weighted += weighted + static_cast<double>(sum) * (static_cast<double>(reference) - row.reference);
  }
}

// What both gradient writers share: smoothing, the transform's slope, the label's entry.
template <typename T, typename Acc>
ACCUMLOSS_NOINLINE void finish_grad_block(const RowSegment& row, int64_t begin, int64_t n,
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
void write_grad_general(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient, T* grad) {
  using Acc = typename AccOf<T>::type;
  using Real = typename Vectors<Acc>::Real;
  constexpr int kWidth = Vectors<Acc>::kWidth;
  const T* x = static_cast<const T*>(row.x);
  const Transform<Acc> transform(options);
  const RoundedLse<Acc> rounded(gradient);
  const Acc lse = rounded.lse, probability = rounded.probability, entropy = rounded.entropy;
  alignas(64) Acc z[kBlock];
  alignas(64) Acc g[kBlock];
  for (int64_t begin = row.begin; begin < row.end; begin += kBlock) {
    const int64_t n = row.end - begin < kBlock ? row.end - begin : kBlock;
    const int64_t padded = round_up(n, kLanes);
    load_block(x + begin, n, z, row.ahead(begin));
    if (!transform.is_identity()) transform_block(z, padded, transform);
    if (entropy == 0) {
      for (int64_t i = 0; i < padded; i += kWidth) {
        Real d = load(z + i) - lse;
        store(exp_clamped<Acc>(d) * probability, g + i);
      }
    } else {
      for (int64_t i = 0; i < padded; i += kWidth) {
        Real d = load(z + i) - lse;
        const Real e = exp_clamped<Acc>(d);  // d is finite then
        store(e * (probability - d * entropy), g + i);
      }
    }
    finish_grad_block(row, begin, n, transform, static_cast<Acc>(gradient.smoothing), static_cast<Acc>(gradient.target),
                      z, grad, g);
  }
}

template <typename T>
void write_grad_from_exps_general(const RowSegment& row, const LossOptions& options, const RowGrad<double>& gradient,
                                  const typename AccOf<T>::type* exps, const typename AccOf<T>::type* references,
                                  T* grad) {
  using Acc = typename AccOf<T>::type;
  constexpr int kWidth = Vectors<Acc>::kWidth;
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

}  // namespace
}  // namespace cpu
}  // namespace accumloss
