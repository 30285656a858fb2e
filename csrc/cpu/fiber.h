// A stack of its own for every lane, and the switch from one to another.
//
//   prepare_fiber   what to switch to for a fiber that starts `entry` on its stack
//   switch_fiber    stores the running fiber's state in *save and resumes the one of `load`
//
// Hand-written on x86-64; ucontext, which makes two system calls per switch, elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace hip_cpu {

#if defined(__x86_64__)
// Saves the callee-saved registers of the running fiber and resumes another. The control words
// (mxcsr, x87) are the same for all fibers and stay.
extern "C" void aiter_hip_cpu_switch(void** save, void* load);
asm(R"(
.text
.align 16
.type aiter_hip_cpu_switch, @function
.hidden aiter_hip_cpu_switch
.globl aiter_hip_cpu_switch
aiter_hip_cpu_switch:
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
.size aiter_hip_cpu_switch, .-aiter_hip_cpu_switch
)");

struct FiberContext {};

inline void switch_fiber(void** save, void* load) { aiter_hip_cpu_switch(save, load); }

inline void* prepare_fiber(FiberContext&, void (*entry)(), char* stack_top, size_t) {
  void** sp = reinterpret_cast<void**>(stack_top);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at the entry, and ends a backtrace
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#else
struct FiberContext {
  ucontext_t context;
};

inline void switch_fiber(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

inline void* prepare_fiber(FiberContext& fiber, void (*entry)(), char* stack_top, size_t size) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_top - size;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  return &fiber.context;
}
#endif

}  // namespace hip_cpu
