// Switching between stacks. By hand on x86-64, as swapcontext makes a system call each time; swapcontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

namespace emulator {

struct Stack {
  void* top;
};

// Saves the registers that a call must keep, goes to the other stack, and restores what that one saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

inline void start_stack(Stack& stack, char* memory, size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(entry);  // where `ret` goes, with the stack aligned as after a call
  stack.top = words;
}

inline void switch_stack(Stack& from, Stack& to) { emulator_switch(&from.top, to.top); }

}  // namespace emulator

#else

#include <ucontext.h>

namespace emulator {

struct Stack {
  ucontext_t context;
};

inline void start_stack(Stack& stack, char* memory, size_t bytes, void (*entry)()) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = memory;
  stack.context.uc_stack.ss_size = bytes;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
}

inline void switch_stack(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }

}  // namespace emulator

#endif
