// One stack and one saved stack pointer a CUDA thread.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t kStackBytes = 128 * 1024, kPage = 4096, kStacks = 8 * 1024;

#if defined(__x86_64__)

using Context = void*;  // the stack pointer

// Pushes what a callee must keep, swaps the stacks, pops it.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.local emu_switch
.type emu_switch, @function
emu_switch:
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
.size emu_switch, .-emu_switch
)");

inline void switch_context(Context& save, Context& load) { emu_switch(&save, load); }

inline void make_context(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);  // 16-byte aligned
  *--top = nullptr;                                           // entry's return address; it never returns
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }

inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

// All stacks lie in one region, each above a guard page, so that "is this a local variable" is one comparison.
class Stacks {
 public:
  char* take() {
    if (base_ == nullptr) reserve();
    if (free_.empty()) add();
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }

  void give_back(char* stack) { free_.push_back(stack); }

  bool contains(const void* pointer) const {
    const auto* p = static_cast<const char*>(pointer);
    return base_ <= p && p < base_ + kStacks * kStride;
  }

 private:
  static constexpr size_t kStride = kStackBytes + kPage;

  void reserve() {
    void* mapping =
        mmap(nullptr, kStacks * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(mapping);
  }

  // One more stack and its guard, when it is needed: a guard is a mapping of its own, and a process has so many.
  void add() {
    if (count_ == kStacks)
      std::abort();  // not reached: three blocks that run, three early ones and a new one are alive
    char* guard = base_ + count_++ * kStride;
    if (mprotect(guard, kPage, PROT_NONE) != 0) std::abort();
    free_.push_back(guard + kPage);
  }

  char* base_ = nullptr;
  size_t count_ = 0;
  std::vector<char*> free_;
};

}  // namespace emu
