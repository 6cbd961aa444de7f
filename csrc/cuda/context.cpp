#include "context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

// Lives in libtorch_cuda, which a CPU-only PyTorch lacks: weak, so that the module loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace accumloss::cuda {

struct Context::State {
  int32_t device_index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  std::optional<torch::stable::Tensor> scratch;

  explicit State(int32_t index) : device_index(index), guard(index) {}
};

Context::Context(int32_t device_index) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(
        "accumloss: the installed PyTorch is CPU-only, got a CUDA tensor; install a PyTorch with CUDA");
  }
  state_ = std::make_unique<State>(device_index);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
    throw std::runtime_error("accumloss: PyTorch gave no current CUDA stream for device " +
                             std::to_string(device_index));
  }
  state_->stream = static_cast<cudaStream_t>(stream);
}

Context::~Context() = default;

cudaStream_t Context::stream() const { return state_->stream; }

int Context::capability() const {
  const auto attribute = [this](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, state_->device_index);
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("accumloss: attributes of the CUDA device: ") + cudaGetErrorString(error));
    }
    return value;
  };
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

void* Context::scratch(size_t bytes) {
  state_->scratch = torch::stable::empty(
      {static_cast<int64_t>(bytes)}, torch::headeronly::ScalarType::Byte, std::nullopt,
      torch::stable::Device(torch::headeronly::DeviceType::CUDA,
                            static_cast<torch::stable::accelerator::DeviceIndex>(state_->device_index)));
  return state_->scratch->mutable_data_ptr();
}

}  // namespace accumloss::cuda
