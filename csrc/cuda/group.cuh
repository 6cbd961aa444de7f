// The threads that share a row: a warp or a block. Both merge to the same bits in every thread, whatever the order in
// which the threads arrive: the maximum first, then sums along a fixed butterfly.
#pragma once

#include <cstdint>

#include "../row.h"
#include "plan.h"

namespace accumloss {

__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(ACCUMLOSS_EMULATE_CUDA)
  return emulator::dynamic_shared();  // of the running block: those of a cluster run side by side
#else
  extern __shared__ __align__(128) unsigned char smem[];
  return smem;
#endif
}

namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Over kLanes neighbours; mask names those of the calling lane.
template <int kLanes = kWarp, typename Value>
__device__ __forceinline__ Value warp_sum(Value value, unsigned mask = kAllLanes) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(mask, value, lane);
  return value;
}

// kGeneral: the state's linear sums are in use.
template <bool kGeneral, int kLanes = kWarp, typename Acc>
__device__ __forceinline__ RowState<Acc> warp_merge(RowState<Acc> state, unsigned mask = kAllLanes) {
  Acc merged = state.max;
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    const Acc other = __shfl_xor_sync(mask, merged, lane);
    merged = other > merged ? other : merged;
  }
  const Acc scale = RowState<Acc>::rescale(state.max, merged);
  if (kGeneral) state.weighted = state.weighted_about(merged, scale);
  state.max = merged;
  state.sum = warp_sum<kLanes>(state.sum * scale, mask);
  if (kGeneral) {
    state.weighted = warp_sum<kLanes>(state.weighted, mask);
    state.linear = warp_sum<kLanes>(state.linear, mask);
  }
  return state;
}

// kLanes neighbours of a warp.
template <int kLanes>
struct Tile {
  static constexpr int kGroups = kTileThreads / kLanes;  // of a block
  static constexpr int kRows = 4;                        // of a group, one after the other
  static constexpr int kRowsPerBlock = kGroups * kRows;

  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x) / kLanes; }
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ __forceinline__ int size() const { return kLanes; }
  // The other groups of the warp may be elsewhere: their rows are ignored, or at their end.
  __device__ __forceinline__ unsigned mask() const {
    return kAllLanes >> (kWarp - kLanes) << (index() % (kWarp / kLanes) * kLanes);
  }
  template <bool kGeneral, typename Acc>
  __device__ __forceinline__ RowState<Acc> merge(const RowState<Acc>& state) const {
    return warp_merge<kGeneral, kLanes>(state, mask());
  }
  __device__ __forceinline__ bool any(bool flag) const { return __any_sync(mask(), flag); }
  // compute() once for all, then a barrier. A warp takes as long for one lane as for all of them.
  template <typename Value, typename Compute>
  __device__ __forceinline__ Value once(const Compute& compute) const {
    const Value value = compute();
    __syncwarp(mask());
    return value;
  }
};
using Packed = Tile<8>;
using Warp = Tile<kWarp>;

// Each member may be called once in a kernel: nothing is synchronised before shared memory is written again.
struct BlockGroup {
  static constexpr size_t kOnceOffset = 4 * kWarp * sizeof(double);
  static constexpr size_t kSharedBytes = kOnceOffset + 128;
  static_assert(kSharedBytes == kHeldHeader, "plan.h knows another size");

  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }

  template <bool kGeneral, typename Acc>
  __device__ __forceinline__ RowState<Acc> merge(RowState<Acc> state) const {
    Acc* const shared = reinterpret_cast<Acc*>(dynamic_shared());  // (4, kWarp)
    const int lane = rank() % kWarp;
    const int warp = rank() / kWarp;
    state = warp_merge<kGeneral>(state);
    if (lane == 0) {
      shared[warp] = state.max;
      shared[kWarp + warp] = state.sum;
      if (kGeneral) {
        shared[2 * kWarp + warp] = state.weighted;
        shared[3 * kWarp + warp] = state.linear;
      }
    }
    __syncthreads();
    state = RowState<Acc>();
    if (lane < size() / kWarp) {
      state.max = shared[lane];
      state.sum = shared[kWarp + lane];
      if (kGeneral) {
        state.weighted = shared[2 * kWarp + lane];
        state.linear = shared[3 * kWarp + lane];
      }
    }
    return warp_merge<kGeneral>(state);
  }

  __device__ __forceinline__ bool any(bool flag) const { return __syncthreads_or(flag); }

  // compute() in the first thread, then a barrier: the logarithms in double are slow on most devices.
  template <typename Value, typename Compute>
  __device__ __forceinline__ Value once(const Compute& compute) const {
    static_assert(sizeof(Value) <= kSharedBytes - kOnceOffset, "does not fit");
    Value* const shared = reinterpret_cast<Value*>(dynamic_shared() + kOnceOffset);
    if (rank() == 0) *shared = compute();
    __syncthreads();
    return *shared;
  }
};

}  // namespace cuda
}  // namespace accumloss
