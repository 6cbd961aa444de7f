// What the gradient of a row is multiplied by, in the precision of the loops: from the sums of the row, or, in a
// backward, from lse and nll. Formulas: row.h. No double where Acc is float: a device may have a 64th as many units.
#pragma once

#include <cmath>
#include <cstdint>

#include "../backend.h"
#include "../row.h"

namespace accumloss::cuda {

// Below exp(-kBeyond) of the larger one, the smaller of two shares is carried in units of exp(-kFar); beyond kNothing
// it is 0. exp(-kFar) and exp(kFar - kNothing) are as far from the ends of the type.
template <typename Acc>
struct Far;
template <>
struct Far<float> {
  static constexpr float kBeyond = 64.0f, kFar = 44.0f, kNothing = 200.0f;
  static constexpr float kExpFar = 7.7811322e-20f;
};
template <>
struct Far<double> {
  static constexpr double kBeyond = 600.0, kFar = 400.0, kNothing = 1200.0;
  static constexpr double kExpFar = 1.9151695967140057e-174;
};

// Of one row: exp(z - max) times scale is a class's probability; and the label's own share and that of the others,
// each to its own relative precision. All NaN where the row is no distribution.
template <typename Acc>
struct Shares {
  Acc scale;
  Acc others;

  // state: the classes other than the label.  z: the label's.
  __device__ __forceinline__ Shares(const RowState<Acc>& state, Acc z) {
    using std::exp;
    using std::fabs;
    // max - z in two pieces
    const Acc d = state.max - z;
    const Acc part = d - state.max;
    const Acc low = (state.max - (d - part)) + (-z - part);
    leads_ = d <= 0;
    const Acc distance = fabs(d);
    // The smaller of the two in units of the larger, and of exp(-kFar) where it would not be a normal number.
    const bool is_far = distance > Far<Acc>::kBeyond;
    const Acc unit = is_far ? Far<Acc>::kExpFar : Acc(1);
    Acc e = exp((is_far ? Far<Acc>::kFar : Acc(0)) - distance);
    e = distance >= Far<Acc>::kNothing ? Acc(0) : e + (leads_ ? low : -low) * e;  // beyond, low may be inf - inf
    smaller_ = (leads_ ? state.sum * e : e) * unit;
    total_ = z < static_cast<Acc>(kInfinity) ? (leads_ ? Acc(1) : state.sum) + smaller_ : z - z;  // NaN of inf too
    scale = leads_ ? e / total_ * unit : Acc(1) / total_;
    others = leads_ ? state.sum * e / total_ * unit : state.sum / total_;
  }

  __device__ __forceinline__ Acc target() const { return (leads_ ? Acc(1) : smaller_) / total_; }
  __device__ __forceinline__ Acc lse(const RowState<Acc>& state, Acc z) const {
    using std::log;
    using std::log1p;
    return leads_ ? z + log1p(smaller_) : state.max + log(total_);
  }

 private:
  bool leads_;
  Acc smaller_, total_;  // in units of the larger of exp(max) and exp(z): the label's or the others', and both
};

// dL/dz_j of a row, times grad: (probability + entropy (high + low - z_j)) exp(z_j - high - low) - smoothing w_j, and
// `target` of the label.
template <typename Acc>
struct RowFactor {
  Acc high, low;
  Acc probability;
  Acc entropy;  // 0 but in a backward of the general kernels
  Acc smoothing;
  Acc target;
};

// What comes back to a row.
template <typename Acc>
struct RowGrads {
  Acc loss, nll, lse, entropy;
  Acc H;        // the entropy of the row, where something comes back to it
  bool by_row;  // else nothing comes back but to the loss
};

// What the options make of it, once for a call.
template <typename Acc>
struct FactorOptions {
  Acc hard;    // 1 - label_smoothing
  Acc share;   // label_smoothing / V
  Acc z_loss;  // 2 z_loss

  explicit FactorOptions(const CrossEntropyInputs& inputs)
      : hard(static_cast<Acc>(1.0 - inputs.options.label_smoothing)),
        share(static_cast<Acc>(inputs.options.label_smoothing / static_cast<double>(inputs.options.vocab_size))),
        z_loss(static_cast<Acc>(2.0 * inputs.options.z_loss)) {}
};

// And the incoming gradient of the rows: the one place that makes a row's factor.
template <typename Acc, bool kGeneral>
struct FactorView {
  FactorOptions<Acc> options;
  Acc grad;
  Acc share_sum = 0;  // share times the weights of all classes

  __device__ __forceinline__ FactorView(const FactorOptions<Acc>& of, const CrossEntropyInputs& inputs, Acc incoming)
      : options(of), grad(incoming) {
    if constexpr (kGeneral) {
      share_sum = options.share * (inputs.weight_sum ? static_cast<Acc>(*inputs.weight_sum)
                                                     : static_cast<Acc>(inputs.options.vocab_size));
    }
  }

  // weight: of the label's class.
  __device__ __forceinline__ RowFactor<Acc> of(const RowState<Acc>& state, Acc z_label, Acc weight) const {
    const Shares<Acc> shares(state, z_label);
    const Acc own = options.hard * weight;
    Acc soft = share_sum;
    RowFactor<Acc> factor;
    factor.target = -own * shares.others;
    if (kGeneral || options.z_loss > 0) {
      if (options.z_loss > 0) soft += options.z_loss * shares.lse(state, z_label);
      factor.target += soft * shares.target() - options.share * weight;
    }
    factor.target *= grad;
    factor.high =
        state.max == static_cast<Acc>(-kInfinity) ? Acc(0) : state.max;  // any: no class has a probability then
    factor.low = 0;
    factor.probability = grad * (own + soft) * shares.scale;
    factor.entropy = 0;
    factor.smoothing = grad * options.share;
    return factor;
  }

  // kExactExponent: exp(z - lse) is formed from two pieces of lse; else, where the elements are too coarse to see the
  // difference, the low one goes into the factor.
  template <bool kExactExponent>
  __device__ __forceinline__ RowFactor<Acc> of_lse(double lse, Acc nll, Acc weight, const RowGrads<Acc>& grads) const {
    using std::exp;
    using std::expm1;
    const Acc own = options.hard * weight;
    Acc soft = share_sum;
    RowFactor<Acc> factor;
    factor.high = static_cast<Acc>(lse);
    factor.low = static_cast<Acc>(lse - static_cast<double>(factor.high));
    if (options.z_loss > 0) soft += options.z_loss * factor.high;
    factor.target = own * expm1(-nll);
    if (kGeneral || options.z_loss > 0) factor.target += soft * exp(-nll) - options.share * weight;
    factor.target *= grads.loss;
    factor.probability = grads.loss * (own + soft);
    factor.entropy = 0;
    if (grads.by_row) {  // RowGrad::add of row.h
      const Acc p = exp(-nll);
      factor.probability += grads.nll + grads.lse;
      factor.target += grads.nll * expm1(-nll) + p * grads.lse;
      if (kGeneral && grads.entropy != 0) {
        factor.probability -= grads.entropy * grads.H;
        if (p != 0) factor.target += p * (grads.entropy * (nll - grads.H));
        factor.entropy = grads.entropy;
      }
    }
    if (!kExactExponent) {
      factor.probability *= exp(-factor.low);
      factor.low = 0;
    }
    factor.smoothing = grads.loss * options.share;
    return factor;
  }
};

}  // namespace accumloss::cuda
