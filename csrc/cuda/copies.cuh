// Copies of 16 bytes from global to shared memory that a thread starts and waits for itself (cp.async; before sm_80 a
// load and a store). The emulator of the tests stands in here.
#pragma once

#if defined(ACCUMLOSS_EMULATE_CUDA)
#include <emulated_copies.h>
#else

#include <cuda_pipeline_primitives.h>

namespace accumloss::cuda {

// The first `before` and the last `behind` bytes are not looked at by anybody, and may be written meanwhile. Of what
// the thread itself has read at that place the copy is told by nobody but the order of its instructions.
__device__ __forceinline__ void copy_vector(void* shared, const void* global, int /*before*/, int /*behind*/) {
  __pipeline_memcpy_async(shared, global, 16);
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
