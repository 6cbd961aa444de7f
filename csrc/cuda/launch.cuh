// The one way to launch a kernel: cudaLaunchKernelEx, its error as an exception. The emulator of the tests stands in
// here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace accumloss::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("accumloss: ") + what + " failed on CUDA: " + cudaGetErrorString(error));
  }
}

// Blocks of one dimension. blocks is a multiple of cluster.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster = 1;
};

// Beyond this a kernel has to ask for its shared memory.
constexpr int64_t kUnaskedSharedBytes = 48 * 1024;

template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.blocks > 0x7fffffff) {
    throw std::runtime_error(std::string("accumloss: ") + what + ": expected at most 2147483647 blocks, got " +
                             std::to_string(grid.blocks) + "; split the rows over several calls");
  }
  if (grid.shared_bytes > kUnaskedSharedBytes) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)),
        what);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace accumloss::cuda
