// A fiber: a stack of its own, and the switch from one to another. About 20 instructions on x86-64 and aarch64;
// elsewhere, or with FASTNORM_EMULATOR_UCONTEXT, the system's ucontext, which is some ten times slower.
// For emulator.cpp alone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "sanitizer.h"

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(FASTNORM_EMULATOR_UCONTEXT)
#define FASTNORM_EMULATOR_UCONTEXT
#endif

#if defined(FASTNORM_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
// Saves the registers that a function must keep on the stack and the stack pointer in *save, and restores those of
// `load`.
extern "C" void fastnorm_switch_stack(void** save, void* load);

#define FASTNORM_STRING_(text) #text
#define FASTNORM_STRING(text) FASTNORM_STRING_(text)
#define FASTNORM_SYMBOL FASTNORM_STRING(__USER_LABEL_PREFIX__) "fastnorm_switch_stack"
#if defined(__x86_64__)
asm(".text\n"
    ".globl " FASTNORM_SYMBOL "\n" FASTNORM_SYMBOL
    ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#else
asm(".text\n"
    ".globl " FASTNORM_SYMBOL "\n.p2align 2\n" FASTNORM_SYMBOL
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
#endif
#endif

namespace fastnorm::emulator {

// A point of execution: of a fiber, or of the thread that launched.
struct Context {
#if defined(FASTNORM_EMULATOR_UCONTEXT)
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;   // AddressSanitizer's
  void* tsan_thread = nullptr;  // ThreadSanitizer's
  Context* came_from = nullptr;

  // Tells AddressSanitizer where we are; to be called first on a fresh stack and after every switch.
  void arrive() {
    finish_switch(fake_stack, &came_from->stack_bottom, &came_from->stack_bytes);
    fake_stack = nullptr;
  }
};

inline void switch_context(Context& from, Context& to) {
  to.came_from = &from;
  start_switch(&from.fake_stack, to.stack_bottom, to.stack_bytes);
  tsan_switch(to.tsan_thread);
#if defined(FASTNORM_EMULATOR_UCONTEXT)
  swapcontext(&from.state, &to.state);
#else
  fastnorm_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  from.arrive();
}

class Fiber : public Context {
 public:
  using Entry = void (*)();  // never returns

  // `number` tells fibers apart: their stacks begin at different offsets of a page, so that they do not all compete for
  // the same lines of the cache.
  Fiber(int number, Entry entry) : entry_(entry), color_(number % 61 * 64) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = kStackBytes + page;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stack of a fiber");
    mapped_ = static_cast<unsigned char*>(mapped);
    // An overflow ends in a fault, not in a neighbour. A process has 65530 mappings, and a guarded stack takes two.
    if (number < kGuarded) mprotect(mapped_, page, PROT_NONE);
    stack_bottom = mapped_ + page;
    stack_bytes = kStackBytes;
    prepare();
  }
  ~Fiber() {
    tsan_destroy(tsan_thread);
    munmap(mapped_, mapped_bytes_);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Abandons the contents of the stack: the next switch begins at the entry again. For ThreadSanitizer, all that it did
  // happens before the next actions of `by`.
  void restart(const Context& by, void* token) {
    tsan_switch(tsan_thread);
    release(token);
    tsan_switch(by.tsan_thread);
    acquire(token);
    tsan_destroy(tsan_thread);
    unpoison(stack_bottom, stack_bytes);
    prepare();
  }

 private:
  static constexpr int kGuarded = 1 << 14;
  static constexpr size_t kStackBytes = kSanitizer ? 256 << 10 : 64 << 10;

  void prepare() {
    fake_stack = nullptr;
    tsan_thread = tsan_create();
#if defined(FASTNORM_EMULATOR_UCONTEXT)
    getcontext(&state);
    state.uc_stack.ss_sp = const_cast<void*>(stack_bottom);
    state.uc_stack.ss_size = stack_bytes - color_;
    state.uc_link = nullptr;
    makecontext(&state, entry_, 0);
#else
    void** top = reinterpret_cast<void**>(mapped_ + mapped_bytes_ - color_);
#if defined(__x86_64__)
    *--top = nullptr;  // where the entry would return to; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry_);
    for (int kept = 0; kept < 6; ++kept) *--top = nullptr;
#else
    for (int kept = 0; kept < 20; ++kept) *--top = nullptr;
    top[11] = reinterpret_cast<void*>(entry_);  // x30
#endif
    stack_pointer = top;
#endif
  }

  Entry entry_;
  size_t color_, mapped_bytes_;
  unsigned char* mapped_;
};

}  // namespace fastnorm::emulator
