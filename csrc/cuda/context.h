// What a launcher needs of PyTorch: device guard, current stream, scratch memory. Apart from the kernels, so that they
// compile without torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace accumloss::cuda {

class Context {
 public:
  explicit Context(int32_t device_index);  // makes the device current until the destructor
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream() const;
  int capability() const;  // of the device: 10 * major + minor
  // Memory of PyTorch's allocator, in the order of the current stream, until the destructor. One per context.
  void* scratch(size_t bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace accumloss::cuda
