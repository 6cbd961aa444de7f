// Every plan on a small case, as a program: under -fsanitize=thread or address,undefined it reports races and accesses
// outside of what was allocated. It looks at no value; the tests in Python do.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "backend.h"
#include "cuda_runtime.h"

using namespace accumloss;

extern "C" {
const char* emulated_forward(const CrossEntropyInputs*, const CrossEntropySums*, double*, void*);
const char* emulated_backward(const CrossEntropyInputs*, const double*, const void*, const void*, const LogitsView*);
const char* emulated_forward_with_grad(const CrossEntropyInputs*, const CrossEntropySums*, const void*,
                                       const LogitsView*);
const char* emulated_scale(const LogitsView*, const void*);
const char* emulated_forward_tokens(const CrossEntropyInputs*, const TokenRows*);
const char* emulated_backward_tokens(const CrossEntropyInputs*, const double*, const void*, const void*,
                                     const TokenGrads*, const LogitsView*);
const char* emulated_forward_distillation(const DistillationInputs*, const DistillationRows*);
const char* emulated_backward_distillation(const DistillationInputs*, const DistillationRows*, const double*,
                                           const LogitsView*);
const char* emulated_forward_targets(const TargetInputs*, const TargetRows*);
const char* emulated_backward_targets(const TargetInputs*, const TargetRows*, const double*, const LogitsView*);
void emulated_device(int capability, int multiprocessors, int clusters, int missing);
}

namespace {

std::atomic<int> failures{0};

void report(const char* plan, int64_t V, const char* error) {
  if (error == nullptr) return;
  std::printf("%s, V = %d: %s\n", plan, static_cast<int>(V), error);
  ++failures;
}

// What is told of each row, and rows of two tensors: the logits beside themselves.
void call_of_rows(const char* plan, const CrossEntropyInputs& inputs, const LogitsView& out) {
  const size_t rows = static_cast<size_t>(inputs.logits.B * inputs.logits.T);
  const int64_t V = inputs.logits.V;
  std::vector<float> loss(rows), nll(rows), entropy(rows);
  std::vector<double> lse(rows), teacher_lse(rows), of_student(rows), of_teacher(rows), grad(rows, 0.5);
  std::vector<int64_t> argmax(rows);
  const TokenRows tokens = {loss.data(), lse.data(), nll.data(), entropy.data(), argmax.data()};
  const TokenGrads grads = {grad.data(), grad.data(), grad.data(), grad.data()};
  report(plan, V, emulated_forward_tokens(&inputs, &tokens));
  report(plan, V, emulated_backward_tokens(&inputs, lse.data(), nll.data(), entropy.data(), &grads, &out));
  const DistillationInputs pair = {inputs, inputs.logits, 0.5};
  const DistillationRows divergences = {loss.data(), lse.data(), teacher_lse.data(), of_student.data(),
                                        of_teacher.data()};
  report(plan, V, emulated_forward_distillation(&pair, &divergences));
  report(plan, V, emulated_backward_distillation(&pair, &divergences, grad.data(), &out));
  const TargetInputs targets = {inputs, inputs.logits};
  const TargetRows found = {loss.data(), nll.data(), lse.data(), of_student.data(), of_teacher.data(), argmax.data()};
  report(plan, V, emulated_forward_targets(&targets, &found));
  report(plan, V, emulated_backward_targets(&targets, &found, grad.data(), &out));
}

// offset: floats before the first logit; the allocation ends with the last one.
void call_all(const char* plan, int64_t B, int64_t T, int64_t V, int64_t offset, bool metrics) {
  const int64_t count = B * T * V;
  const std::unique_ptr<float[]> logits(new float[count + offset]), gradient(new float[count + offset]);
  for (int64_t i = 0; i < count; ++i) logits[offset + i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i)));
  std::vector<int64_t> labels(B * T);
  for (int64_t i = 0; i < B * T; ++i) labels[i] = i % 4 == 3 ? -100 : i * 7 % V;
  float loss_sum = 0, total_weight = 0, entropy_sum = 0, grad = 1, factor = 0.5f;
  int64_t num_items = 0, num_correct = 0;
  std::vector<double> lse(B * T);
  std::vector<float> nll(B * T);
  CrossEntropyInputs inputs = {};
  inputs.logits = {logits.get() + offset, Dtype::kFloat32, B, T, V, T * V, V};
  inputs.labels = {labels.data(), false, T, 1};
  inputs.options.metrics = metrics;
  inputs.options.vocab_size = V;
  const CrossEntropySums sums = {&loss_sum, &num_items, &total_weight, &num_correct, &entropy_sum, nullptr};
  LogitsView out = inputs.logits;
  out.data = gradient.get() + offset;
  report(plan, V, emulated_forward(&inputs, &sums, lse.data(), nll.data()));
  report(plan, V, emulated_backward(&inputs, lse.data(), nll.data(), &grad, &out));
  report(plan, V, emulated_forward_with_grad(&inputs, &sums, &grad, &out));
  report(plan, V, emulated_scale(&out, &factor));
  if (metrics) call_of_rows(plan, inputs, out);
  report(plan, V, emulated_forward_with_grad(&inputs, &sums, &grad, &inputs.logits));
}

void run(const char* plan, int64_t B, int64_t T, int64_t V, int64_t offset, bool metrics) {
  setenv("ACCUMLOSS_CUDA_PLAN", plan, 1);
  call_all(plan, B, T, V, offset, metrics);
}

}  // namespace

int main() {
  emulated_device(90, 1, 1, 0);  // one cluster, so that its stages are used again
  emulator::seed(1);
  run("staged:1", 1, 12, 1101, 1, false);
  run("staged:2", 2, 7, 603, 3, true);
  run("staged:4", 1, 5, 1101, 0, false);
  run("held", 1, 2, 1101, 1, false);
  run("block", 1, 2, 1101, 1, true);
  run("warp", 1, 5, 515, 1, false);
  run("packed", 1, 9, 61, 1, true);
  run("packed", 1, 150, 61, 1, false);  // more rows than a block finishes
  run("held", 1, 5, 2051, 1, false);
  run("partly_held:1", 1, 4, 4099, 1, false);
  // Host threads whose first calls are of the same kernels, with shared memory that has to be asked for.
  unsetenv("ACCUMLOSS_CUDA_PLAN");
  emulated_device(80, 2, -1, 0);
  std::thread other([] { call_all("two host threads", 1, 1, 12400, 0, false); });
  call_all("two host threads", 1, 1, 13400, 1, false);
  other.join();
  return failures == 0 ? 0 : 1;
}
