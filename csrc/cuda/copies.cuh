// Copies of 16 bytes from global to shared memory that a thread starts and waits for itself (cp.async; before sm_80 a
// load and a store). The emulator of the tests stands in here.
#pragma once

#if defined(ACCUMLOSS_EMULATE_CUDA)
#include <emulated_copies.h>
#else

#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <nv/target>

namespace accumloss::cuda {

// Lines of the L2 that are copied, which nobody reads a second time, give their places away first (from sm_80 on).
struct CopyPolicy {
  uint64_t policy = 0;

  __device__ __forceinline__ CopyPolicy() {
    NV_IF_TARGET(NV_PROVIDES_SM_80, (asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));));
  }
  __device__ __forceinline__ void copy(void* shared, const void* global) const {
    NV_IF_ELSE_TARGET(NV_PROVIDES_SM_80,
                      (asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                                        static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                                    "l"(__cvta_generic_to_global(global)), "l"(policy) : "memory");),
                      (__pipeline_memcpy_async(shared, global, 16);));
  }
};

// The first `before` and the last `behind` bytes are not looked at by anybody, and may be written meanwhile. Of what
// the thread itself has read at that place the copy is told by nobody but the order of its instructions.
__device__ __forceinline__ void copy_vector(void* shared, const void* global, int /*before*/, int /*behind*/,
                                            const CopyPolicy& policy) {
  policy.copy(shared, global);
}
// The copies since the last call are one batch, perhaps of none.
__device__ __forceinline__ void copies_commit() { __pipeline_commit(); }
// Returns when all but the newest `pending` batches have landed, 0 to 7. The number is part of the instruction.
__device__ __forceinline__ void copies_wait(int pending) {
  switch (pending) {
    case 0:
      return __pipeline_wait_prior(0);
    case 1:
      return __pipeline_wait_prior(1);
    case 2:
      return __pipeline_wait_prior(2);
    case 3:
      return __pipeline_wait_prior(3);
    case 4:
      return __pipeline_wait_prior(4);
    case 5:
      return __pipeline_wait_prior(5);
    case 6:
      return __pipeline_wait_prior(6);
    default:
      return __pipeline_wait_prior(7);
  }
}

}  // namespace accumloss::cuda

#endif
