// The instructions of sm_90 and newer, and the only file that names them: thread-block clusters, mbarriers, bulk
// copies. The emulator of the tests stands in here.
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

// Writes value where `address` of this block's shared memory lies in the shared memory of block `rank`. The other
// block must have started, and must not have left: a cluster_barrier() of all lies before, and another behind.
template <typename T>
__device__ __forceinline__ void cluster_store(T* address, int rank, const T& value) {
  *cooperative_groups::this_cluster().map_shared_rank(address, rank) = value;
}

// One thread, then mbarrier_init_fence() and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  ::cuda::ptx::mbarrier_init(barrier, arrivals);
}

// Makes the initialisations of this thread visible to the copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
}

// One arrival, and that many bytes of copies that the phase also waits for.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
  ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta, ::cuda::ptx::space_shared,
                                         barrier, bytes);
}

// Returns when the phase of that parity has ended; the first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Global to shared memory, on its own; counts its bytes on the barrier. Addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* barrier) {
  ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, shared, global, bytes, barrier);
}

// Between the last read of shared memory by threads and a bulk_load over it, in the thread that issues that.
__device__ __forceinline__ void bulk_load_fence() { ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared); }

}  // namespace accumloss::cuda

#endif
