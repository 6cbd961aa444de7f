// The instructions of sm_90 and newer, and the only file that names them: thread-block clusters and messages between
// their blocks, mbarriers, bulk copies. The emulator of the tests stands in here.
#pragma once

#include <cstdint>
#include <cstring>

namespace accumloss::cuda {

using Mbarrier = uint64_t;  // in shared memory

}  // namespace accumloss::cuda

#if defined(ACCUMLOSS_EMULATE_CUDA)
#include <emulated_async.h>
#else

namespace accumloss::cuda {

// As PTX: <cuda/ptx> takes longer to compile than the kernels that use it. "memory" keeps the compiler from moving
// accesses over a wait, an arrival or a message.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
// Where an address of this block's shared memory lies in that of block `rank`.
__device__ __forceinline__ unsigned remote_address(const void* pointer, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(pointer)), "r"(rank));
  return there;
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// A barrier of all threads of the cluster: what they wrote before, to any block's shared memory, is seen behind it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Sends value to where `address` of this block's shared memory lies in that of block `rank`, on its own; counts its
// bytes on the mbarrier that lies there as `barrier` does here. A mbarrier_wait() of that block sees it. The other
// block must have started, and must not leave before it has waited for it: a cluster_barrier() of all lies before.
template <typename T>
__device__ __forceinline__ void cluster_send(T* address, int rank, const T& value, Mbarrier* barrier) {
  const unsigned there = remote_address(address, rank), arrived = remote_address(barrier, rank);
  static_assert(sizeof(T) == 4 || sizeof(T) % 16 == 0, "4 bytes, or pieces of 16");
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
                 "r"(words[0]), "r"(arrived)
                 : "memory");
  } else {
#pragma unroll
    for (unsigned i = 0; i < sizeof(T) / 16; ++i) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
              there + 16 * i),
          "r"(words[4 * i]), "r"(words[4 * i + 1]), "r"(words[4 * i + 2]), "r"(words[4 * i + 3]), "r"(arrived)
          : "memory");
    }
  }
}

// One thread, then mbarrier_init_fence() and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialisations of this thread visible to the copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier, unsigned count = 1) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// One arrival, and that many bytes of copies and messages that the phase also waits for.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Returns when the phase of that parity has ended; the first phase has parity 0, and the one before it is over. In the
// default form, as an acquire of the whole cluster's would have the first-level cache dropped behind every wait.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  int ended;
  do {
    asm volatile(
        "{\n .reg .pred ended;\n mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        " selp.b32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// Global to shared memory, on its own; counts its bytes on the barrier. Addresses and bytes are multiples of 16. The
// first `before` and the last `behind` bytes are not looked at by anybody, and may be written meanwhile.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes, unsigned /*before*/,
                                          unsigned /*behind*/, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Behind what a thread has written to shared memory and a bulk_load is to overwrite, in that thread, before it tells.
__device__ __forceinline__ void bulk_load_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace accumloss::cuda

#endif
