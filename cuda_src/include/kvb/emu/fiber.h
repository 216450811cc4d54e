// Context switch between fibers: ten instructions on x86-64, ucontext elsewhere (or with -DKVB_EMU_UCONTEXT).  ucontext
// is portable but costs two system calls for the signal mask per round trip.  AddressSanitizer and ThreadSanitizer are
// told about the switches.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(KVB_EMU_UCONTEXT)
#define KVB_EMU_ASSEMBLY 1
#else
#define KVB_EMU_ASSEMBLY 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define KVB_EMU_ASAN(...) __VA_ARGS__
#else
#define KVB_EMU_ASAN(...)
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {   // the fiber half of the interface, missing from the header of g++ 12
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#define KVB_EMU_TSAN(...) __VA_ARGS__
#else
#define KVB_EMU_TSAN(...)
#endif
// Marks the emulator's own functions: their loads and stores are not the kernel's, ThreadSanitizer must not see them.
#define KVB_EMU_OWN __attribute__((no_sanitize("thread")))

namespace kvb::emu {

struct Context {
#if KVB_EMU_ASSEMBLY
  void* stack_pointer;
#else
  ucontext_t saved;
#endif
  const void* stack;   // for the sanitizers
  size_t stack_size;
  void* tsan_fiber;
};

#if KVB_EMU_ASSEMBLY
// Saves the callee-saved registers on the current stack and its top in *save, then continues at `load`.  MXCSR and the
// x87 control word are not switched: kernels do not change them.
extern "C" void kvb_emu_switch(void** save, void* load);
asm(R"(
.pushsection .text
.weak kvb_emu_switch
.hidden kvb_emu_switch
.type kvb_emu_switch, @function
kvb_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rdx
  jmp *%rdx
.size kvb_emu_switch, .-kvb_emu_switch
.popsection
)");
KVB_EMU_OWN inline void switch_stacks(Context& from, Context& to) {
  kvb_emu_switch(&from.stack_pointer, to.stack_pointer);
}
KVB_EMU_OWN inline void prepare_stack(Context& context, char* stack, size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size - 64) & ~uintptr_t(15));
  *--top = nullptr;                          // return address of entry(): it never returns
  *--top = reinterpret_cast<void*>(entry);   // where the first switch jumps to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
KVB_EMU_OWN inline void switch_stacks(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
KVB_EMU_OWN inline void prepare_stack(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = size;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#endif

KVB_EMU_OWN inline void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
  KVB_EMU_ASAN(__asan_unpoison_memory_region(stack, size));   // frames that an earlier fiber left behind
  context.stack = stack;
  context.stack_size = size;
  KVB_EMU_TSAN(if (!context.tsan_fiber) context.tsan_fiber = __tsan_create_fiber(0));
  prepare_stack(context, stack, size, entry);
}
KVB_EMU_OWN inline void switch_context(Context& from, Context& to) {
  KVB_EMU_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, to.stack, to.stack_size));
  KVB_EMU_TSAN(__tsan_switch_to_fiber(to.tsan_fiber, 1));   // 1: the switch itself orders nothing
  switch_stacks(from, to);
  KVB_EMU_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr));
}
// The first thing that a new fiber does; `from` is the context that switched to it.
KVB_EMU_OWN inline void entered_from([[maybe_unused]] Context& from) {
  KVB_EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_size));
}

}  // namespace kvb::emu
