// Tells ThreadSanitizer of fibers and of what orders memory: barriers, __syncwarp, mbarriers; shuffles do not. Nothing
// where its library is not linked. The emulator itself is not instrumented, only the kernels are.
#pragma once

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber(void);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // 1: without ordering memory
__attribute__((weak)) void __tsan_acquire(void* token);
__attribute__((weak)) void __tsan_release(void* token);
}

namespace emulator::tsan {
inline bool enabled() {
  static const bool is_linked = __tsan_create_fiber != nullptr;
  return is_linked;
}
inline void* current() { return enabled() ? __tsan_get_current_fiber() : nullptr; }
inline void* create() { return enabled() ? __tsan_create_fiber(0) : nullptr; }
inline void destroy(void* fiber) {
  if (enabled()) __tsan_destroy_fiber(fiber);
}
inline void go_to(void* fiber) {
  if (enabled()) __tsan_switch_to_fiber(fiber, 1);
}
inline void acquire(void* token) {
  if (enabled()) __tsan_acquire(token);
}
inline void release(void* token) {
  if (enabled()) __tsan_release(token);
}
}  // namespace emulator::tsan
