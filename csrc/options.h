// The options of a cross-entropy: the one list of them in C++. tests/test_options.py holds it against
// accumloss/options.py.
#pragma once

#include <cstdint>

namespace accumloss {

// OPTION(C++ type, type in a schema, name, default)
#define ACCUMLOSS_LOSS_OPTIONS(OPTION)                                                                               \
  OPTION(int64_t, int, ignore_index, -100)    /* rows with this label count nothing; may lie inside [0, V) */        \
  OPTION(double, float, label_smoothing, 0.0) /* share of the target mass spread evenly over V classes, in [0, 1] */ \
  OPTION(double, float, z_loss, 0.0)          /* adds z_loss * lse^2 per item, not weighted by class */              \
  OPTION(double, float, softcap, 0.0)         /* logits become softcap * tanh(logit_scale * x / softcap); 0: off */  \
  OPTION(double, float, logit_scale, 1.0)     /* logits are multiplied by this first, > 0 */

struct LossOptions {
  int64_t shift = 0;  // row (b, t) reads label (b, t + shift); rows without one are ignored
#define ACCUMLOSS_FIELD(type, schema_type, name, value) type name = value;
  ACCUMLOSS_LOSS_OPTIONS(ACCUMLOSS_FIELD)
#undef ACCUMLOSS_FIELD
  bool metrics = false;  // also count correct top-1 predictions and sum the entropies
  // Where several processes share the vocabulary, the logits are its classes [class_offset, class_offset + V) of
  // vocab_size. Labels are of all of it. Else 0 and V.
  int64_t class_offset = 0;
  int64_t vocab_size = 0;
};

}  // namespace accumloss
