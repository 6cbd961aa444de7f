// The one way to launch a kernel: cudaLaunchKernelEx, its error as an exception. What is asked of a device once, by any
// host thread, is kept here. The emulator of the tests stands in here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

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

inline int current_device(const char* what) {
  int device = 0;
  check(cudaGetDevice(&device), what);
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* what) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

// Whether the build has nothing that this device, or its driver, can run of a kernel.
inline bool is_image_missing(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorJitCompilationDisabled;
}

// Loads a kernel on the current device and lets it have all the shared memory that a block can get. Once for a kernel
// and device, not before each launch: another thread's launch with more shared memory may be about to follow.
inline cudaError_t load(const char* what, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, cudaError_t> known;
  const int device = current_device(what);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, what);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes)),
          what);
  } else {
    cudaGetLastError();  // it is reported here, and not by whoever asks next
    if (!is_image_missing(error)) check(error, what);
  }
  known[{device, kernel}] = error;
  return error;
}

inline void require_image(const char* what, const void* kernel) {
  const cudaError_t error = load(what, kernel);
  if (error == cudaSuccess) return;
  const int device = current_device(what);
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device, what);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device, what);
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  throw std::runtime_error(
      std::string("accumloss: ") + what + ": expected a build for sm_" + std::to_string(10 * major + minor) +
      ", got one without it (" + cudaGetErrorString(error) +
      "; accumloss.build_info() names its architectures); build it for this GPU: TORCH_CUDA_ARCH_LIST=" + version +
      " pip install --no-build-isolation --no-deps --force-reinstall . in its sources, or update the driver where it "
      "is "
      "older than the CUDA toolkit of the build");
}

inline cudaLaunchConfig_t configuration(const Grid& grid, cudaStream_t stream, cudaLaunchAttribute* cluster) {
  *cluster = {};
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return config;
}

// How many clusters (of one block: blocks) of such a grid the current device runs at once; 0: not even one. Kept by
// stream as well, since the multiprocessors of a green context are those of its streams.
inline int64_t resident_clusters(const char* what, const void* kernel, const Grid& grid, cudaStream_t stream) {
  using Key = std::tuple<int, cudaStream_t, const void*, int, int64_t, int>;
  constexpr size_t kMostKept = 4096;  // streams come and go
  static std::mutex mutex;
  static std::map<Key, int64_t> known;
  require_image(what, kernel);
  const int device = current_device(what);
  const Key key = {device, stream, kernel, grid.threads, grid.shared_bytes, grid.cluster};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int count = 0;
  int64_t clusters = 0;
  if (grid.cluster == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, grid.threads,
                                                        static_cast<size_t>(grid.shared_bytes)),
          what);
    clusters = static_cast<int64_t>(count) * device_attribute(cudaDevAttrMultiProcessorCount, device, what);
  } else {
    Grid one = grid;
    one.blocks = grid.cluster;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(one, stream, &attribute);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    if (error == cudaErrorInvalidClusterSize) {  // no room for one
      cudaGetLastError();
      count = 0;
    } else {
      check(error, what);
    }
    clusters = count;
  }
  if (known.size() >= kMostKept) known.clear();
  known[key] = clusters;
  return clusters;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.blocks > 0x7fffffff) {
    throw std::runtime_error(std::string("accumloss: ") + what + ": expected at most 2147483647 blocks, got " +
                             std::to_string(grid.blocks) + "; split the rows over several calls");
  }
  require_image(what, reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configuration(grid, stream, &attribute);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace accumloss::cuda
