// The CUDA backend: chooses the launchers of the logits' type.
#include <utility>

#include "launchers.cuh"
#include "pairs.h"

namespace accumloss {
namespace {

template <typename F>
void dispatch(Dtype dtype, const F& call) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return call(cuda::Launchers<__nv_bfloat16>());
    case Dtype::kFloat16:
      return call(cuda::Launchers<__half>());
    case Dtype::kFloat32:
      return call(cuda::Launchers<float>());
    case Dtype::kFloat64:
      return call(cuda::Launchers<double>());
  }
}

}  // namespace

cuda::Plan cuda::device_plan(int32_t device_index, int64_t V, Dtype dtype, Pass pass, bool aligned) {
  const Context context(device_index);
  Plan plan = {};
  dispatch(dtype, [&](auto launchers) { plan = launchers.device_plan(context, pass, V, aligned); });
  return plan;
}

const Backend& cuda_backend() {
  static const Backend backend = {
      [](const CrossEntropyInputs& inputs, const CrossEntropySums& sums, double* lse, void* nll) {
        dispatch(inputs.logits.dtype, [&](auto launchers) { launchers.forward(inputs, sums, lse, nll); });
      },
      [](const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* grad_loss_sum,
         const LogitsView& grad_logits) {
        dispatch(inputs.logits.dtype,
                 [&](auto launchers) { launchers.backward(inputs, lse, nll, grad_loss_sum, grad_logits); });
      },
      [](const CrossEntropyInputs& inputs, const CrossEntropySums& sums, const void* grad_loss_sum,
         const LogitsView& grad_logits) {
        dispatch(inputs.logits.dtype,
                 [&](auto launchers) { launchers.forward_with_grad(inputs, sums, grad_loss_sum, grad_logits); });
      },
      [](const CrossEntropyInputs& inputs, double* columns) {
        dispatch(inputs.logits.dtype, [&](auto launchers) { launchers.forward_shard(inputs, columns); });
      },
      [](const LogitsView& values, const void* factor) {
        dispatch(values.dtype, [&](auto launchers) { launchers.scale(values, factor); });
      },
      [](size_t, void**) -> void* { return nullptr; },  // torch keeps what is freed on CUDA
      nullptr,
      [](const CrossEntropyInputs& inputs, const TokenRows& to) {
        dispatch(inputs.logits.dtype, [&](auto launchers) { launchers.forward_tokens(inputs, to); });
      },
      [](const CrossEntropyInputs& inputs, const double* lse, const void* nll, const void* entropy,
         const TokenGrads& grads, const LogitsView& grad_logits) {
        dispatch(inputs.logits.dtype,
                 [&](auto launchers) { launchers.backward_tokens(inputs, lse, nll, entropy, grads, grad_logits); });
      },
      cuda::forward_distillation,
      cuda::backward_distillation,
      cuda::forward_targets,
      cuda::backward_targets,
  };
  return backend;
}

}  // namespace accumloss
