// The mathematics of one row, for host and device. No torch and no CUDA header: testable alone.
//
// Notation: x_j is a logit, z_j = transform(x_j), y the label, w_j the class weights (1 where there are none),
// W = sum_j w_j, p_j = exp(z_j - lse), nll = lse - z_y, e = label_smoothing. The loss of the row is
//
//   L = (1 - e) w_y nll  +  e / V * sum_j w_j (lse - z_j)  +  z_loss * lse^2
//
// The label never enters the sum of exponentials: RowState holds the other classes only. nll is then
// log1p(S / e_y) and keeps its relative precision however confident the row is, where lse - z_y cancels; and
// 1 - p_y = -expm1(-nll) does the same for the gradient of the label.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "options.h"

#if defined(__CUDACC__) || defined(ACCUMLOSS_EMULATE_CUDA)
#define ACCUMLOSS_HD __host__ __device__ __forceinline__
#else
// Forced inline: the CPU kernels include this header once for each instruction set, and an out-of-line copy
// of one of them must not serve the others.
#define ACCUMLOSS_HD inline __attribute__((always_inline))
#endif

namespace accumloss {

// As variables: device code may use their values, but not call std::numeric_limits.
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The parts of LossOptions that a logit passes through, in the type of the computation.
template <typename Acc>
struct Transform {
  Acc logit_scale;
  Acc softcap;  // 0: off
  Acc inner;    // logit_scale / softcap, or 0

  ACCUMLOSS_HD explicit Transform(const LossOptions& options)
      : logit_scale(static_cast<Acc>(options.logit_scale)),
        softcap(static_cast<Acc>(options.softcap)),
        inner(options.softcap > 0 ? static_cast<Acc>(options.logit_scale / options.softcap) : Acc(0)) {}

  ACCUMLOSS_HD bool is_identity() const { return softcap == 0 && logit_scale == 1; }

  // z(x)
  ACCUMLOSS_HD Acc value(Acc x) const {
    using std::tanh;
    return softcap > 0 ? softcap * tanh(inner * x) : logit_scale * x;
  }

  // dz/dx = logit_scale * sech^2(u). Written with E = exp(-2|u|) as 4E / (1 + E)^2, which keeps its relative
  // precision where the cap saturates; 1 - tanh^2 does not.
  ACCUMLOSS_HD Acc slope(Acc x) const {
    using std::exp;
    using std::fabs;
    if (!(softcap > 0)) return logit_scale;
    const Acc e = exp(Acc(-2) * fabs(inner * x));
    return logit_scale * (Acc(4) * e / ((Acc(1) + e) * (Acc(1) + e)));
  }
};

// Sums over the classes other than the label. The empty state is the identity of merge().
// `reference` (the label's z where that is finite, else 0) only shifts the two linear sums, so that they stay small.
// CUDA keeps the two so that float holds them: see RowView.
template <typename Acc>
struct RowState {
  Acc max = static_cast<Acc>(-kInfinity);  // max_j z_j
  Acc sum = 0;                             // S = sum_j exp(z_j - max)
  Acc weighted = 0;                        // sum_j exp(z_j - max) (z_j - reference); metrics only
  Acc linear = 0;                          // sum_j w_j (z_j - reference); label smoothing only

  // exp(from - to) for the change of the maximum, 1 where both are -inf (nothing was summed yet).
  ACCUMLOSS_HD static Acc rescale(Acc from, Acc to) {
    using std::exp;
    return from == to ? Acc(1) : exp(from - to);
  }

  ACCUMLOSS_HD void merge(const RowState& other) {
    const Acc merged = max > other.max ? max : other.max;
    const Acc here = rescale(max, merged);
    const Acc there = rescale(other.max, merged);
    sum = sum * here + other.sum * there;
    weighted = (here == 0 ? 0 : weighted * here) + (there == 0 ? 0 : other.weighted * there);
    linear += other.linear;
    max = merged;
  }

  // Where weighted is relative to max: what it comes to relative to another one, in units of exp of that, scale being
  // rescale(max, other_max). A sum of logits that far below may be beyond float, and counts nothing.
  ACCUMLOSS_HD Acc weighted_about(Acc other_max, Acc scale) const {
    if (sum == 0 || scale == 0) return 0;
    return (max == other_max ? weighted : weighted + sum * (max - other_max)) * scale;
  }
  // merge() for such.
  ACCUMLOSS_HD void merge_about_max(const RowState& other) {
    const Acc merged = max > other.max ? max : other.max;
    const Acc both =
        weighted_about(merged, rescale(max, merged)) + other.weighted_about(merged, rescale(other.max, merged));
    merge(other);
    weighted = both;
  }
};

// What one row adds to the sums.
struct RowResult {
  double loss;
  double lse;
  double nll;      // lse - z_y, at full relative precision
  double entropy;  // -sum_j p_j log p_j; metrics only
};

// reference of RowState
ACCUMLOSS_HD double row_reference(double target) { return target - target == 0 ? target : 0.0; }

// A label so far below the largest logit has probability 0 in double too. Its z, of a masked class often the lowest
// number that there is, is then no origin for lse and entropy, whose digits it would swallow: the largest logit is.
constexpr double kFarBelow = 1024;
ACCUMLOSS_HD bool is_far_below(double target, double others_max) { return others_max - target > kFarBelow; }
// What RowState::weighted is relative to where row_result() takes it.
ACCUMLOSS_HD double entropy_reference(double target, double others_max) {
  return target - target == 0 && is_far_below(target, others_max) ? others_max : row_reference(target);
}

// target: z_y; target_weight: w_y; weight_sum: W; V: classes. others.linear is relative to row_reference(),
// others.weighted to entropy_reference().
template <typename Acc>
ACCUMLOSS_HD RowResult row_result(const RowState<Acc>& others, double target, double target_weight, double weight_sum,
                                  int64_t V, const LossOptions& options) {
  using std::exp;
  using std::log;
  using std::log1p;
  const double others_max = others.max;
  const double max = others_max > target ? others_max : target;
  RowResult row;
  if (!(max - max == 0) || target != target) {  // all -inf, or +inf or NaN somewhere: not a distribution
    row.loss = row.lse = row.nll = row.entropy = kNaN;
    return row;
  }
  // S in units of exp(max), and nll = log((S + e_y) / e_y)
  const double sum = others.sum == 0 ? 0.0 : static_cast<double>(others.sum) * exp(others_max - max);
  row.nll = target == max ? log1p(sum) : (max - target) + log(sum + exp(target - max));
  const bool is_far = is_far_below(target, max);
  row.lse = is_far ? max + log(sum) : target + row.nll;
  row.loss = (1.0 - options.label_smoothing) * target_weight * row.nll;
  if (options.label_smoothing > 0) {
    const double reference = row_reference(target);
    const double linear = others.linear + target_weight * (target - reference);
    const double lse = is_far ? (max - reference) + log(sum) : (target - reference) + row.nll;  // less the reference
    row.loss += options.label_smoothing / static_cast<double>(V) * (weight_sum * lse - linear);
  }
  if (options.z_loss > 0) row.loss += options.z_loss * row.lse * row.lse;
  // H = log Z - sum_j p_j (z_j - max), Z in units of exp(max): a sum of terms that are not negative, whichever class
  // the label is
  row.entropy = 0;
  if (options.metrics) {
    const double e_y = exp(target - max), scale = others.sum == 0 ? 0.0 : exp(others_max - max);
    const double below =  // sum_j exp(z_j - max) (z_j - max) of the others
        scale == 0 ? 0.0
                   : (static_cast<double>(others.weighted) +
                      static_cast<double>(others.sum) * (entropy_reference(target, others_max) - max)) *
                         scale;
    const double log_total = target == max ? row.nll : log(sum + e_y);
    row.entropy = log_total - (below + (e_y == 0 ? 0.0 : e_y * (target - max))) / (sum + e_y);
  }
  return row;
}

// What the classes of a shard add to a row of the whole vocabulary: accumloss/parallel.py merges them. The label's
// class is one of the shard's, or of another's. Logarithms are about `max`: of logits such as 1e38 a sum with it would
// keep nothing of them.
struct ShardRow {
  double max;      // of z_j over the shard's classes other than the label; -inf where there are none
  double log_sum;  // log sum_j exp(z_j - max) of the same classes; -inf where they have no probability, NaN for +inf
  double target;   // z_y; NaN where another shard has the label
  double linear;   // sum_j w_j (z_j - shard_reference()) over all classes of the shard; label smoothing only
  double entropy;  // of the others among themselves; metrics only
  double best;     // the caller's, metrics only: the largest x_j; x_y where it is the first of them, else NaN, if the
                   // shard has the label
};

// The first of the two that is finite, else 0.
ACCUMLOSS_HD double shard_reference(double max, double target) { return max - max == 0 ? max : row_reference(target); }

// origin: z_y, or where another shard has the label the z of any class. others.linear is relative to
// row_reference(origin), others.weighted to entropy_reference(origin, others.max). target_weight: w_y, 0 where another
// shard has the label; weight_sum: of the shard's classes.
template <typename Acc>
ACCUMLOSS_HD ShardRow shard_row(const RowState<Acc>& others, bool has_label, double origin, double target_weight,
                                double weight_sum, const LossOptions& options) {
  using std::log;
  ShardRow row;
  const double max = others.max, sum = others.sum;
  row.max = max;
  row.log_sum = max == kInfinity ? kNaN : sum == 0 ? -kInfinity : log(sum);
  row.target = has_label ? origin : kNaN;
  row.linear = row.entropy = row.best = 0;
  if (options.label_smoothing > 0) {
    const double reference = row_reference(origin), about = shard_reference(max, row.target);
    row.linear = static_cast<double>(others.linear) + (weight_sum - target_weight) * (reference - about);
    if (has_label) row.linear += target_weight * (origin - about);
  }
  // -sum_j q_j log q_j of q_j = exp(z_j - max - row.log_sum)
  if (options.metrics && sum != 0)
    row.entropy = row.log_sum + ((max - entropy_reference(origin, max)) - static_cast<double>(others.weighted) / sum);
  return row;
}

// Where the numbers of ShardRow go: (count, N), those that the options ask for, in their order.
struct ShardColumns {
  double* data;
  int64_t N;

  ACCUMLOSS_HD static int count(const LossOptions& options) {
    return 3 + (options.label_smoothing > 0 ? 1 : 0) + (options.metrics ? 2 : 0);
  }
  ACCUMLOSS_HD void write(int64_t row, const ShardRow& values, const LossOptions& options) const {
    double* at = data + row;
    *at = values.max;
    *(at += N) = values.log_sum;
    *(at += N) = values.target;
    if (options.label_smoothing > 0) *(at += N) = values.linear;
    if (!options.metrics) return;
    *(at += N) = values.entropy;
    *(at += N) = values.best;
  }
};

// Everything that the gradient of a row needs, from lse and nll:
//   dL/dz_j = C p_j - (e / V) w_j,                                     j != y,  C = (1 - e) w_y + (e / V) W + 2 z_loss
//   lse dL/dz_y = (C - (1 - e) w_y) p_y - (1 - e) w_y (1 - p_y) - (e / V) w_y
// all times grad, and times transform.slope(x_j) for dL/dx_j.
constexpr double kSwallowed = 64;  // more is no sum of classes that are near the label's
template <typename Acc>
struct RowGrad {
  Acc lse_high, lse_low;  // lse in two pieces: |lse| must not cost the exponent its low bits
  Acc probability;        // grad * C
  Acc smoothing;          // grad * e / V
  Acc target;             // grad * dL/dz_y
  Acc entropy = 0;        // p_j times it times (lse - z_j) comes to the gradient of each class but the label
  double swallowed =
      0;  // nll where lse = z_y + nll is z_y to the last bit, of logits such as 1e38; it is in the factors

  ACCUMLOSS_HD RowGrad(double lse, double nll, double target_weight, double weight_sum, int64_t V, double grad,
                       const LossOptions& options) {
    using std::exp;
    using std::expm1;
    const double share = options.label_smoothing / static_cast<double>(V);
    const double hard = (1.0 - options.label_smoothing) * target_weight;
    const double soft = share * weight_sum + 2.0 * options.z_loss * lse;
    lse_high = static_cast<Acc>(lse);
    lse_low = static_cast<Acc>(lse - static_cast<double>(lse_high));
    if (lse - nll == lse && nll < kSwallowed) swallowed = nll;
    probability = static_cast<Acc>(grad * (hard + soft) * exp(-swallowed));
    smoothing = static_cast<Acc>(grad * share);
    target = static_cast<Acc>(grad * (soft * exp(-nll) + hard * expm1(-nll) - share * target_weight));
  }

  // Adds what comes back to nll, lse and the entropy H of the row by themselves:
  //   d nll/dz_j = p_j - [j = y],   d lse/dz_j = p_j,   dH/dz_j = -p_j (z_j - lse + H),   and z_y - lse = -nll
  ACCUMLOSS_HD void add(double nll, double H, double grad_nll, double grad_lse, double grad_entropy) {
    using std::exp;
    using std::expm1;
    const double p_y = exp(-nll);
    const double share = exp(-swallowed);
    probability += static_cast<Acc>((grad_nll + grad_lse - grad_entropy * (H - swallowed)) * share);
    target += static_cast<Acc>(grad_nll * expm1(-nll) + (p_y == 0 ? 0.0 : p_y * (grad_lse + grad_entropy * (nll - H))));
    entropy = static_cast<Acc>(grad_entropy * share);
  }
};

}  // namespace accumloss
