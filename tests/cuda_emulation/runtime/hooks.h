// What the compiler calls: -fsanitize=thread puts a call before every access to memory that another thread could see,
// and -fsanitize=bounds,alignment,shift one where it finds a mistake. These are not the sanitizers' libraries.
#pragma once

#define EMU_HOOKS(bytes)                                                                                        \
  void __tsan_read##bytes(void* p) { emu::access(p, bytes, emu::Access::read, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* p) { emu::access(p, bytes, emu::Access::write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                                  \
    emu::access(p, bytes, emu::Access::read, __builtin_return_address(0));                                      \
  }                                                                                                             \
  void __tsan_unaligned_write##bytes(void* p) {                                                                 \
    emu::access(p, bytes, emu::Access::write, __builtin_return_address(0));                                     \
  }

// Every report starts with the place in the source.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

#define EMU_REPORT(name, message)                                            \
  [[noreturn]] void __ubsan_handle_##name##_abort(SourceLocation* at, ...) { \
    emu::machine.error_at = __builtin_return_address(0);                     \
    if (emu::machine.running == nullptr) std::abort();                       \
    emu::fail("%s (%s:%u:%u)", message, at->file, at->line, at->column);     \
  }

extern "C" {
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_init() {}
// Of the guard of a static variable, which only host code has.
unsigned char __tsan_atomic8_load(const volatile void* p, int) {
  return __atomic_load_n(static_cast<const volatile unsigned char*>(p), __ATOMIC_ACQUIRE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t bytes) { emu::access(p, bytes, emu::Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) {
  emu::access(p, bytes, emu::Access::write, __builtin_return_address(0));
}
EMU_REPORT(out_of_bounds, "an index outside its array")
EMU_REPORT(type_mismatch_v1, "a misaligned access")
EMU_REPORT(shift_out_of_bounds, "a shift by more bits than the type has")
EMU_REPORT(divrem_overflow, "a division that overflows")
EMU_REPORT(add_overflow, "an addition that overflows")
EMU_REPORT(sub_overflow, "a subtraction that overflows")
EMU_REPORT(mul_overflow, "a product that overflows")
EMU_REPORT(negate_overflow, "a negation that overflows")
}
