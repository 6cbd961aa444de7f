// csrc/cuda/async.cuh as the emulator runs it. Default arguments take the file and line of the caller.
#pragma once

#include "cuda_runtime.h"

#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulator {
void cluster_barrier(Site site);
void* remote(Site site, void* address, size_t bytes, size_t alignment, int rank);
void mbarrier_init(Site site, uint64_t* barrier, unsigned arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(Site site, uint64_t* barrier, unsigned count, unsigned bytes);
void mbarrier_wait(Site site, uint64_t* barrier, unsigned parity);
void bulk_load(Site site, void* shared, const void* global, unsigned bytes, unsigned before, unsigned behind,
               uint64_t* barrier);
void bulk_load_fence();
void cluster_send(Site site, void* address, int rank, const void* value, unsigned bytes, uint64_t* barrier);
}  // namespace emulator

namespace accumloss::cuda {

inline int cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_size() { return emulator::cluster_size(); }
inline void cluster_barrier(EMULATOR_CALLER) { emulator::cluster_barrier({file, line, "cluster_barrier"}); }
template <typename T>
void cluster_send(T* address, int rank, const T& value, Mbarrier* barrier, EMULATOR_CALLER) {
  constexpr unsigned kPiece = sizeof(T) < 16 ? sizeof(T) : 16;
  for (unsigned at = 0; at < sizeof(T); at += kPiece) {
    emulator::cluster_send({file, line, "cluster_send"}, reinterpret_cast<char*>(address) + at, rank,
                           reinterpret_cast<const char*>(&value) + at, kPiece, barrier);
  }
}
inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals, EMULATOR_CALLER) {
  emulator::mbarrier_init({file, line, "mbarrier_init"}, barrier, arrivals);
}
inline void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
inline void mbarrier_arrive(Mbarrier* barrier, unsigned count = 1, EMULATOR_CALLER) {
  emulator::mbarrier_arrive({file, line, "mbarrier_arrive"}, barrier, count, 0);
}
inline void mbarrier_expect(Mbarrier* barrier, unsigned bytes, EMULATOR_CALLER) {
  emulator::mbarrier_arrive({file, line, "mbarrier_expect"}, barrier, 1, bytes);
}
inline void mbarrier_wait(Mbarrier* barrier, unsigned parity, EMULATOR_CALLER) {
  emulator::mbarrier_wait({file, line, "mbarrier_wait"}, barrier, parity);
}
inline void bulk_load(void* shared, const void* global, unsigned bytes, unsigned before, unsigned behind,
                      Mbarrier* barrier, EMULATOR_CALLER) {
  emulator::bulk_load({file, line, "bulk_load"}, shared, global, bytes, before, behind, barrier);
}
inline void bulk_load_fence() { emulator::bulk_load_fence(); }

}  // namespace accumloss::cuda
