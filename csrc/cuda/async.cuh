// The instructions of sm_90 and newer, and the only file that names them: thread-block clusters and messages between
// their blocks, mbarriers, bulk copies. The emulator of the tests stands in here.
#pragma once

#include <cstdint>

namespace accumloss::cuda {

using Mbarrier = uint64_t;  // in shared memory

}  // namespace accumloss::cuda

#if defined(ACCUMLOSS_EMULATE_CUDA)
#include <emulated_async.h>
#else

#include <cooperative_groups.h>

#include <cuda/ptx>

namespace accumloss::cuda {

__device__ __forceinline__ int cluster_rank() { return static_cast<int>(::cuda::ptx::get_sreg_cluster_ctarank()); }
__device__ __forceinline__ int cluster_size() { return static_cast<int>(::cuda::ptx::get_sreg_cluster_nctarank()); }

// A barrier of all threads of the cluster: what they wrote before, to any block's shared memory, is seen behind it.
__device__ __forceinline__ void cluster_barrier() {
  ::cuda::ptx::barrier_cluster_arrive(::cuda::ptx::sem_release);
  ::cuda::ptx::barrier_cluster_wait(::cuda::ptx::sem_acquire);
}

// Sends value to where `address` of this block's shared memory lies in that of block `rank`, on its own; counts its
// bytes on the mbarrier that lies there as `barrier` does here. A mbarrier_wait() of that block sees it. The other
// block must have started, and must not leave before it has waited for it: a cluster_barrier() of all lies before.
template <typename T>
__device__ __forceinline__ void cluster_send(T* address, int rank, const T& value, Mbarrier* barrier) {
  const auto cluster = cooperative_groups::this_cluster();
  T* const there = cluster.map_shared_rank(address, rank);
  Mbarrier* const arrived = cluster.map_shared_rank(barrier, rank);
  static_assert(sizeof(T) == 4 || sizeof(T) % 16 == 0, "4 bytes, or pieces of 16");
  if constexpr (sizeof(T) == 4) {
    ::cuda::ptx::st_async(reinterpret_cast<uint32_t*>(there), reinterpret_cast<const uint32_t&>(value), arrived);
  } else {
    using Piece = uint32_t[4];
#pragma unroll
    for (size_t i = 0; i < sizeof(T) / 16; ++i) {
      ::cuda::ptx::st_async(reinterpret_cast<uint32_t*>(there) + 4 * i, reinterpret_cast<const Piece*>(&value)[i],
                            arrived);
    }
  }
}

// One thread, then mbarrier_init_fence() and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  ::cuda::ptx::mbarrier_init(barrier, arrivals);
}

// Makes the initialisations of this thread visible to the copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier, unsigned count = 1) {
  ::cuda::ptx::mbarrier_arrive(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta, ::cuda::ptx::space_shared, barrier,
                               count);
}

// One arrival, and that many bytes of copies and messages that the phase also waits for.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
  ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta, ::cuda::ptx::space_shared,
                                         barrier, bytes);
}

// Returns when the phase of that parity has ended; the first phase has parity 0, and the one before it is over. In the
// default form, as an acquire of the whole cluster's would have the first-level cache dropped behind every wait.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Global to shared memory, on its own; counts its bytes on the barrier. Addresses and bytes are multiples of 16. The
// first `before` and the last `behind` bytes are not looked at by anybody, and may be written meanwhile.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes, unsigned /*before*/,
                                          unsigned /*behind*/, Mbarrier* barrier) {
  ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, shared, global, bytes, barrier);
}

// Behind what a thread has written to shared memory and a bulk_load is to overwrite, in that thread, before it tells.
__device__ __forceinline__ void bulk_load_fence() { ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared); }

}  // namespace accumloss::cuda

#endif
