// The options of a cross-entropy as plain data; mirrors accumloss/options.py field by field.
#pragma once

#include <cstdint>

namespace accumloss {

struct LossOptions {
  int64_t shift = 0;            // row (b, t) reads label (b, t + shift); rows without one are ignored
  int64_t ignore_index = -100;  // rows with this label count nothing; may lie inside [0, V)
  double label_smoothing = 0;   // share of the target mass spread evenly over the V classes, in [0, 1]
  double z_loss = 0;            // adds z_loss * lse^2 per item, not weighted by class
  double softcap = 0;           // logits become softcap * tanh(logit_scale * x / softcap); 0: off
  double logit_scale = 1;       // logits are multiplied by this first, > 0
  bool metrics = false;         // also count correct top-1 predictions and sum the entropies
};

}  // namespace accumloss
