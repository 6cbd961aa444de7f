// The threads that share a row: lanes of a warp, or a block. Both merge to the same bits in every thread, whatever the
// order in which the threads arrive: the maximum first, then sums along a fixed butterfly.
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

// Over `lanes` neighbours; mask names those of the calling lane. Without a branch: a step that is too wide brings the
// lane's own value.
template <typename Value>
__device__ __forceinline__ Value warp_sum(Value value, unsigned mask = kAllLanes, int lanes = kWarp) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const Value other = __shfl_xor_sync(mask, value, lane < lanes ? lane : 0);
    value += lane < lanes ? other : Value(0);
  }
  return value;
}
template <typename Value>
__device__ __forceinline__ Value warp_max(Value value, unsigned mask = kAllLanes, int lanes = kWarp) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const Value other = __shfl_xor_sync(mask, value, lane < lanes ? lane : 0);
    value = other > value ? other : value;
  }
  return value;
}

// kGeneral: the state's linear sums are in use.
template <bool kGeneral, typename Acc>
__device__ __forceinline__ RowState<Acc> warp_merge(RowState<Acc> state, unsigned mask = kAllLanes, int lanes = kWarp) {
  const Acc merged = warp_max(state.max, mask, lanes);
  const Acc scale = RowState<Acc>::rescale(state.max, merged);
  if (kGeneral) state.weighted = state.weighted_about(merged, scale);
  state.max = merged;
  state.sum = warp_sum(state.sum * scale, mask, lanes);
  if (kGeneral) {
    state.weighted = warp_sum(state.weighted, mask, lanes);
    state.linear = warp_sum(state.linear, mask, lanes);
  }
  return state;
}

// Neighbours of a warp, a power of two, that share a row: a block of kTileThreads is that many groups.
struct Lanes {
  int lanes;

  __device__ __forceinline__ explicit Lanes(int groups) : lanes(kTileThreads / groups) {}
  __device__ __forceinline__ int size() const { return lanes; }
  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x) / lanes; }
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) & (lanes - 1); }
  __device__ __forceinline__ int first() const {
    return static_cast<int>(threadIdx.x) % kWarp - rank();
  }  // of the warp
  // What the rank-th of them has. All lanes of the warp.
  template <typename Value>
  __device__ __forceinline__ Value of(Value value, int rank) const {
    return __shfl_sync(kAllLanes, value, first() + rank);
  }
};

// merge() takes two places in turn: who writes one for the merge after the next has passed the barrier of the next, so
// all have read it.
struct BlockGroup {
  static constexpr size_t kSharedBytes = 2 * 4 * kWarp * sizeof(double);
  static_assert(kSharedBytes == kBlockHeader && kSharedBytes / 2 == kHeldHeader, "plan.h knows another size");
  int merges = 0;

  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }

  template <bool kGeneral, typename Acc>
  __device__ __forceinline__ RowState<Acc> merge(RowState<Acc> state) {
    Acc* const shared = reinterpret_cast<Acc*>(dynamic_shared()) + merges % 2 * (4 * kWarp);  // (4, kWarp)
    ++merges;
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

  // The sum, or the largest, of what the threads have; the same in every thread. Acc: of the kernel's merges.
  template <typename Acc, typename Value>
  __device__ __forceinline__ Value sum(Value value) {
    return across_warps<Acc>(warp_sum(value), Value(0), [](Value one) { return warp_sum(one); });
  }
  template <typename Acc, typename Value>
  __device__ __forceinline__ Value max(Value value) {
    value = warp_max(value);
    return across_warps<Acc>(value, value, [](Value one) { return warp_max(one); });
  }

 private:
  template <typename Acc, typename Value, typename Merge>
  __device__ __forceinline__ Value across_warps(Value of_warp, Value nothing, const Merge& merge) {
    static_assert(sizeof(Value) <= 4 * sizeof(Acc), "it is to fit into a place of merge()");
    Value* const shared = reinterpret_cast<Value*>(reinterpret_cast<Acc*>(dynamic_shared()) + merges % 2 * (4 * kWarp));
    ++merges;
    const int lane = rank() % kWarp;
    if (lane == 0) shared[rank() / kWarp] = of_warp;
    __syncthreads();
    return merge(lane < size() / kWarp ? shared[lane] : nothing);
  }
};

// Where the first of the largest numbers is, NaN being the largest: torch.argmax. A thread's places grow.
template <typename Acc>
struct LargestAt {
  static constexpr int64_t kNowhere = int64_t{1} << 62;
  Acc value = static_cast<Acc>(-kInfinity);
  int64_t at = kNowhere, nan = kNowhere;

  __device__ __forceinline__ void push(Acc x, int64_t place) {
    if (x != x) {
      nan = nan == kNowhere ? place : nan;
    } else if (at == kNowhere || x > value) {
      value = x;
      at = place;
    }
  }
  // Of all threads of a group that have a number, the same in each.
  template <typename Group>
  __device__ __forceinline__ int64_t first(Group& group) const {
    const int64_t first_nan = -group.template max<Acc>(-nan);
    if (first_nan != kNowhere) return first_nan;
    const Acc largest = group.template max<Acc>(value);
    return -group.template max<Acc>(value == largest ? -at : -kNowhere);
  }
};

// Either, told at run time: `lanes` neighbours, or where they are more than a warp the block.
struct AnyGroup {
  int lanes;
  BlockGroup block;

  __device__ __forceinline__ int size() const { return lanes; }
  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x) / lanes; }
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) & (lanes - 1); }
  // The other groups of the warp may be elsewhere: their rows are ignored, or at their end.
  __device__ __forceinline__ unsigned mask() const {
    return kAllLanes >> (kWarp - lanes) << (static_cast<int>(threadIdx.x) % kWarp - rank());
  }
  template <bool kGeneral, typename Acc>
  __device__ __forceinline__ RowState<Acc> merge(const RowState<Acc>& state) {
    return lanes > kWarp ? block.merge<kGeneral>(state) : warp_merge<kGeneral>(state, mask(), lanes);
  }
  __device__ __forceinline__ bool any(bool flag) const {
    return lanes > kWarp ? block.any(flag) : static_cast<bool>(__any_sync(mask(), flag));
  }
  template <typename Acc, typename Value>
  __device__ __forceinline__ Value max(Value value) {
    return lanes > kWarp ? block.max<Acc>(value) : warp_max(value, mask(), lanes);
  }
  // What all have read lies before what any writes. Of a block, a merge has seen to that.
  __device__ __forceinline__ void order() const {
    if (lanes <= kWarp) __syncwarp(mask());
  }
};

}  // namespace cuda
}  // namespace accumloss
