// A CUDA device in one OS thread: each CUDA thread is a fiber, and fibers switch at barriers and warp collectives only,
// in an order drawn from a seed: any of the threads, or, in half of the blocks, warps far ahead of others. Blocks run
// one after the other. Not seen: weak memory order, spin-waits between threads, limits of registers, the accuracy of
// the device's functions, contraction to fused multiply-add, speed, inline PTX, and the errors of this model of CUDA
// itself. A GPU stays the arbiter.
#pragma once

// All of the standard library that the sources use, as it spells attributes in names that are defined below.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#undef __host__
#undef __device__
#undef __global__
#undef __shared__
#undef __grid_constant__
#undef __launch_bounds__
#undef __noinline__
#undef __forceinline__
#undef __align__
#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

extern uint3 threadIdx, blockIdx;  // of the running thread
extern dim3 blockDim, gridDim;

namespace emulator {

struct Site {
  const char* file;
  int line;
  const char* what;
};

std::string describe(const Site& site);
// Ends the launch with an error: the scheduler does not come back to a fiber after one.
void fail(const std::string& message);

int barrier(Site site, int predicate);  // the disjunction of the predicates

enum class Collective { kShuffle, kAny, kAll, kBallot, kSync, kMax };
// Every lane of the mask brings value (bytes) and the lane that it reads; its result replaces value.
void collective(Site site, Collective kind, unsigned mask, void* value, int bytes, int source_lane);

int lane();
void seed(uint64_t value);

// Any host thread may launch; the kernels themselves run one after the other.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

// Goes to a new device. clusters: how many clusters of a grid run at once, whatever the grid; a grid of a kernel with
// mbarriers may have no more. -1: as many as fit on its multiprocessors. missing: how many kernels, those that are
// loaded first, the build has no image of; -1: all.
void device(int capability, int multiprocessors, int clusters, int missing);
int capability();
int64_t questions();              // of kernels and of clusters to the device, since the last call
unsigned char* dynamic_shared();  // of the running block
int cluster_rank();
int cluster_size();
int64_t bulk_copies();   // since the last call
int64_t largest_grid();  // in blocks, since the last call

template <typename T>
T shuffle(Site site, unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  collective(site, Collective::kShuffle, mask, &value, sizeof(T), source_lane);
  return value;
}
inline unsigned vote(Site site, Collective kind, unsigned mask, int predicate) {
  unsigned value = predicate != 0;
  collective(site, kind, mask, &value, sizeof(value), lane());
  return value;
}

inline int reduce_max(Site site, unsigned mask, int value) {
  collective(site, Collective::kMax, mask, &value, sizeof(value), lane());
  return value;
}

// 2^x, results that are no normal numbers as 0. exp_error(): in units of 2^-22, 1 or -1 of every result; 2: any between
// them, by x; 0: none but the rounding.
float flushed_exp2(float x);
void exp_error(int kind);
// That warp of each block runs when no other can, and copies land at once; -1: none.
void starve(int warp);

template <typename To, typename From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The device multiplies by log2(e) in float and takes 2 to that power.
inline float fast_exp(float x) { return std::exp2(x * 1.44269504f); }

// What a thread has written before a fence and an atomic is seen behind an atomic to the same address and a fence.
void thread_fence();
void before_atomic(void* address);

template <typename T>
T atomic_add(T* address, T value) {
  before_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomic_max(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}

}  // namespace emulator

#define EMULATOR_SITE(what) (::emulator::Site{__FILE__, __LINE__, what})
#define __syncthreads() ((void)::emulator::barrier(EMULATOR_SITE("__syncthreads"), 0))
#define __syncthreads_or(predicate) ::emulator::barrier(EMULATOR_SITE("__syncthreads_or"), predicate)
#define __syncwarp(mask) ((void)::emulator::vote(EMULATOR_SITE("__syncwarp"), ::emulator::Collective::kSync, mask, 0))
#define __any_sync(mask, predicate) \
  ((int)::emulator::vote(EMULATOR_SITE("__any_sync"), ::emulator::Collective::kAny, mask, predicate))
#define __all_sync(mask, predicate) \
  ((int)::emulator::vote(EMULATOR_SITE("__all_sync"), ::emulator::Collective::kAll, mask, predicate))
#define __ballot_sync(mask, predicate) \
  ::emulator::vote(EMULATOR_SITE("__ballot_sync"), ::emulator::Collective::kBallot, mask, predicate)
#define __shfl_sync(mask, value, source) ::emulator::shuffle(EMULATOR_SITE("__shfl_sync"), mask, value, (source) % 32)
#define __shfl_xor_sync(mask, value, flip) \
  ::emulator::shuffle(EMULATOR_SITE("__shfl_xor_sync"), mask, value, ::emulator::lane() ^ (flip))
#define __shfl_down_sync(mask, value, delta)                          \
  ::emulator::shuffle(EMULATOR_SITE("__shfl_down_sync"), mask, value, \
                      ::emulator::lane() + (int)(delta) < 32 ? ::emulator::lane() + (int)(delta) : ::emulator::lane())
#define __popc(x) __builtin_popcount(x)
#define __ffs(x) __builtin_ffs(x)
#define __reduce_max_sync(mask, value) ::emulator::reduce_max(EMULATOR_SITE("__reduce_max_sync"), mask, value)
#define __float_as_int(x) ::emulator::same_bits<int>(static_cast<float>(x))
#define __int_as_float(x) ::emulator::same_bits<float>(static_cast<int>(x))
#define __uint_as_float(x) ::emulator::same_bits<float>(static_cast<unsigned>(x))
#define __expf(x) ::emulator::fast_exp(x)
#define __ldcg(address) (*(address))
#define __ldcs(address) (*(address))
#define __threadfence() ::emulator::thread_fence()
#define __stcs(address, value) ((void)(*(address) = (value)))
#define atomicAdd(address, value) ::emulator::atomic_add(address, value)
#define atomicMax(address, value) ::emulator::atomic_max(address, value)

// The part of the runtime that the launchers use.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
extern "C" {
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t bytes);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
}
