// Scratch memory of one call: carved from a buffer that the calling thread keeps, so that no step allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/kernels.h"

namespace lsk {

class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    thread_local Buffer buffer;
    base_ = buffer.at_least(bytes);
  }

  // Memory for `count` values, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes<T>(count);
    return out;
  }

  template <class T>
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  struct Buffer {
    std::byte* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
    std::byte* at_least(size_t wanted) {
      if (wanted > size) {
        std::free(memory);
        size = (wanted + 4095) / 4096 * 4096;
        memory = static_cast<std::byte*>(std::aligned_alloc(4096, size));
        if (memory == nullptr) {
          size = 0;
          throw std::bad_alloc();
        }
      }
      return memory;
    }
  };

  std::byte* base_;
  size_t used_ = 0;
};

}  // namespace lsk
