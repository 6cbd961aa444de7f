// The one way to launch a kernel: cudaLaunchKernelEx, its error as an exception. The emulator of the tests stands in
// here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace accumloss::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("accumloss: ") + what + " failed on CUDA: " + cudaGetErrorString(error));
  }
}

template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string("accumloss: ") + what + ": expected at most 2147483647 blocks, got " +
                             std::to_string(blocks) + "; split the rows over several calls");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace accumloss::cuda
