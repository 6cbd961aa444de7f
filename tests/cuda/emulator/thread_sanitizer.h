// Tells ThreadSanitizer of fibers and of what orders memory: barriers, __syncwarp, mbarriers; shuffles do not. Empty
// without EMULATOR_TSAN. The emulator itself is not instrumented, only the kernels are.
#pragma once

#if defined(EMULATOR_TSAN)

extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // 1: without ordering memory
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}

namespace emulator::tsan {
constexpr bool kEnabled = true;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void go_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void acquire(void* token) { __tsan_acquire(token); }
inline void release(void* token) { __tsan_release(token); }
}  // namespace emulator::tsan

#else

namespace emulator::tsan {
constexpr bool kEnabled = false;
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void go_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
}  // namespace emulator::tsan

#endif
