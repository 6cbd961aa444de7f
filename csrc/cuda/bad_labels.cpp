#include "bad_labels.h"

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace accumloss {
namespace cuda {
namespace {

std::mutex allocation;
std::atomic<BadLabel*> record{nullptr};

}  // namespace

BadLabel* bad_label_record() {
  if (BadLabel* const existing = record.load(std::memory_order_acquire)) return existing;
  const std::lock_guard<std::mutex> lock(allocation);
  if (BadLabel* const existing = record.load(std::memory_order_acquire)) return existing;
  // An allocation is refused while this or another thread captures in the default mode; ours concerns no capture.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  void* memory = nullptr;
  const cudaError_t exchanged = cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t allocated = cudaHostAlloc(&memory, sizeof(BadLabel), cudaHostAllocPortable | cudaHostAllocMapped);
  if (exchanged == cudaSuccess) cudaThreadExchangeStreamCaptureMode(&mode);
  if (allocated != cudaSuccess) {
    throw std::runtime_error(std::string("accumloss: pinned host memory for the record of bad labels: ") +
                             cudaGetErrorString(allocated));
  }
  auto* const fresh = static_cast<BadLabel*>(memory);
  *fresh = BadLabel{0, 0};
  record.store(fresh, std::memory_order_release);
  return fresh;
}

}  // namespace cuda

bool take_bad_label(int64_t* row, int64_t* label) {
  cuda::BadLabel* const shared = cuda::record.load(std::memory_order_acquire);
  if (shared == nullptr) return false;
  volatile int64_t* const row_plus_one = &shared->row_plus_one;
  const volatile int64_t* const value = &shared->label;
  // A kernel may write while this reads: take the pair only when it stands still.
  int64_t seen = *row_plus_one;
  if (seen == 0) return false;
  int64_t seen_label = *value;
  for (int64_t again; (again = *row_plus_one) != seen || *value != seen_label; seen_label = *value) seen = again;
  *row_plus_one = 0;
  *row = seen - 1;
  *label = seen_label;
  return true;
}

void check_bad_labels() {
  int64_t row = 0, label = 0;
  if (!take_bad_label(&row, &label)) return;
  throw std::out_of_range("cross_entropy: expected labels in [0, V) or ignore_index, got " + std::to_string(label) +
                          " for row " + std::to_string(row) +
                          " of an earlier call on CUDA; check vocab_size and the value that pads the labels");
}

}  // namespace accumloss
