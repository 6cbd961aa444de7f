// Kernels over rows of two tensors side by side (pairs.cuh): what Backend says of them.
#pragma once

#include "../backend.h"

namespace accumloss::cuda {

void forward_distillation(const DistillationInputs& inputs, const DistillationRows& to);
void backward_distillation(const DistillationInputs& inputs, const DistillationRows& found, const double* grad_loss,
                           const LogitsView& grad_logits);
void forward_targets(const TargetInputs& inputs, const TargetRows& to);
void backward_targets(const TargetInputs& inputs, const TargetRows& found, const double* grad_loss,
                      const LogitsView& grad_logits);

}  // namespace accumloss::cuda
