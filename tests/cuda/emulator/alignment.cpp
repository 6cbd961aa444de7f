// What g++'s -fsanitize=alignment calls, in the place of its own library: a load or store of a kernel at an address
// that the type does not allow.
#include "cuda_runtime.h"

extern "C" {

struct AlignmentSite {
  const char* file;
  uint32_t line, column;
};

void __ubsan_handle_type_mismatch_v1(const AlignmentSite* site, uintptr_t) {
  emulator::fail(emulator::describe({site->file, static_cast<int>(site->line), "misaligned access"}));
}

}  // extern "C"
