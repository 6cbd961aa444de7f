// The CUDA backend behind plain C functions, on the emulator. tests/cuda/emulated.py calls them.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "backend.h"
#include "bad_labels.h"
#include "context.h"
#include "emulator.h"

namespace accumloss::cuda {

struct Context::State {
  void* memory = nullptr;
};

Context::Context(int32_t) : state_(std::make_unique<State>()) {}
Context::~Context() { std::free(state_->memory); }
int Context::capability() const { return emulator::capability(); }
cudaStream_t Context::stream() const { return nullptr; }
void* Context::scratch(size_t bytes) {
  state_->memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(state_->memory, 0xff, bytes);
  return state_->memory;
}

}  // namespace accumloss::cuda

namespace {

thread_local std::string message;

template <typename F>
const char* guarded(const F& call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

using namespace accumloss;

// Each returns null, or the message of the error.
extern "C" {

const char* emulated_forward(const CrossEntropyInputs* inputs, const CrossEntropySums* sums, double* lse, void* nll) {
  return guarded([&] { cuda_backend().forward(*inputs, *sums, lse, nll); });
}

const char* emulated_backward(const CrossEntropyInputs* inputs, const double* lse, const void* nll,
                              const void* grad_loss_sum, const LogitsView* grad_logits) {
  return guarded([&] { cuda_backend().backward(*inputs, lse, nll, grad_loss_sum, *grad_logits); });
}

const char* emulated_forward_with_grad(const CrossEntropyInputs* inputs, const CrossEntropySums* sums,
                                       const void* grad_loss_sum, const LogitsView* grad_logits) {
  return guarded([&] { cuda_backend().forward_with_grad(*inputs, *sums, grad_loss_sum, *grad_logits); });
}

const char* emulated_forward_shard(const CrossEntropyInputs* inputs, double* columns) {
  return guarded([&] { cuda_backend().forward_shard(*inputs, columns); });
}

const char* emulated_forward_tokens(const CrossEntropyInputs* inputs, const TokenRows* to) {
  return guarded([&] { cuda_backend().forward_tokens(*inputs, *to); });
}

const char* emulated_backward_tokens(const CrossEntropyInputs* inputs, const double* lse, const void* nll,
                                     const void* entropy, const TokenGrads* grads, const LogitsView* grad_logits) {
  return guarded([&] { cuda_backend().backward_tokens(*inputs, lse, nll, entropy, *grads, *grad_logits); });
}

const char* emulated_forward_distillation(const DistillationInputs* inputs, const DistillationRows* to) {
  return guarded([&] { cuda_backend().forward_distillation(*inputs, *to); });
}

const char* emulated_backward_distillation(const DistillationInputs* inputs, const DistillationRows* found,
                                           const double* grad_loss, const LogitsView* grad_logits) {
  return guarded([&] { cuda_backend().backward_distillation(*inputs, *found, grad_loss, *grad_logits); });
}

const char* emulated_forward_targets(const TargetInputs* inputs, const TargetRows* to) {
  return guarded([&] { cuda_backend().forward_targets(*inputs, *to); });
}

const char* emulated_backward_targets(const TargetInputs* inputs, const TargetRows* found, const double* grad_loss,
                                      const LogitsView* grad_logits) {
  return guarded([&] { cuda_backend().backward_targets(*inputs, *found, grad_loss, *grad_logits); });
}

const char* emulated_scale(const LogitsView* values, const void* factor) {
  return guarded([&] { cuda_backend().scale(*values, factor); });
}

int emulated_take_bad_label(int64_t* row, int64_t* label) { return take_bad_label(row, label); }
void emulated_seed(uint64_t value) { emulator::seed(value); }
void emulated_device(int capability, int multiprocessors, int clusters, int missing) {
  emulator::device(capability, multiprocessors, clusters, missing);
}
void emulated_exp_error(int kind) { emulator::exp_error(kind); }
void emulated_starve(int warp) { emulator::starve(warp); }
int64_t emulated_largest_grid() { return emulator::largest_grid(); }
int64_t emulated_questions() { return emulator::questions(); }
int64_t emulated_bulk_copies() { return emulator::bulk_copies(); }
int64_t emulated_inputs_size() { return sizeof(CrossEntropyInputs); }

}  // extern "C"
