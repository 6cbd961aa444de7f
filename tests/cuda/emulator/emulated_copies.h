// csrc/cuda/copies.cuh as the emulator runs it. Default arguments take the file and line of the caller.
#pragma once

#include "cuda_runtime.h"

namespace emulator {
void copy_vector(Site site, void* shared, const void* global, int before, int behind);
void copies_commit();
void copies_wait(Site site, int pending);
}  // namespace emulator

namespace accumloss::cuda {

struct CopyPolicy {};

inline void copy_vector(void* shared, const void* global, int before, int behind, const CopyPolicy&,
                        const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::copy_vector({file, line, "copy_vector"}, shared, global, before, behind);
}
inline void copies_commit() { emulator::copies_commit(); }
inline void copies_wait(int pending, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::copies_wait({file, line, "copies_wait"}, pending);
}

}  // namespace accumloss::cuda
