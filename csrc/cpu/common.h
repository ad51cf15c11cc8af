// Helpers of the CPU ops: scratch memory, argument checks, tiled activations.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/checks.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace lsk {

// Scratch memory of one call, from a buffer that the calling thread keeps: no step allocates. AddressSanitizer reports
// accesses outside the arrays that were taken; a red zone follows each.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    thread_local Buffer buffer;
    base_ = buffer.at_least(bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(base_, buffer.size);
#endif
  }

  // Memory for `count` values, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes<T>(count);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(out, static_cast<size_t>(count) * sizeof(T));
#endif
    return out;
  }

  template <class T>
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + kRedZone;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kRedZone = 64;
#else
  static constexpr size_t kRedZone = 0;
#endif

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

constexpr int64_t kUnit = 16;  // smallest share of weight rows per thread

inline int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

using torch::stable::contiguous;

// Checks that all positions written by a step fit the cache.
inline void check_capacity(const int64_t* seq_lens, int64_t batch, int64_t rows, int64_t capacity) {
  for (int64_t b = 0; b < batch; ++b) {
    LSK_REQUIRE(0 <= seq_lens[b] && seq_lens[b] <= capacity - rows, "sequence ", b, " has length ", seq_lens[b], ", ",
                rows, " more rows do not fit the cache's capacity ", capacity);
  }
}

// Temperature and noise seed of each row, or none.
struct Sampling {
  const float* temperature = nullptr;
  const int64_t* seed = nullptr;

  Sampling(const std::optional<Tensor>& temperature_in, const std::optional<Tensor>& seed_in, int64_t rows) {
    LSK_REQUIRE(temperature_in.has_value() == seed_in.has_value(), "temperature and seed come together");
    temperature = data<float>(temperature_in, "temperature", {rows});
    seed = data<int64_t>(seed_in, "seed", {rows});
    for (int64_t r = 0; temperature && r < rows; ++r)
      LSK_REQUIRE(temperature[r] >= 0 && std::isfinite(temperature[r]), "temperature[", r, "] is ", temperature[r],
                  ", expected a finite number of at least 0");
  }
};

// Checks that sequences use distinct slots: `slots`, or without it one slot per sequence in order.
inline void check_slots(const int64_t* slots, int64_t batch, int64_t num_slots) {
  LSK_REQUIRE(slots || batch == num_slots, "k_cache has ", num_slots, " rows, expected ", batch);
  for (int64_t b = 0; slots && b < batch; ++b) {
    LSK_REQUIRE(0 <= slots[b] && slots[b] < num_slots, "slots[", b, "] is ", slots[b], ", expected one of [0, ",
                num_slots, ")");
    for (int64_t other = 0; other < b; ++other)
      LSK_REQUIRE(slots[other] != slots[b], "slots[", other, "] and slots[", b, "] are both ", slots[b],
                  ", expected distinct rows of the cache");
  }
}

inline int64_t slot_of(const int64_t* slots, int64_t sequence) { return slots ? slots[sequence] : sequence; }

constexpr int64_t kFewRows = 16;

// Rows that this worker prepares for the next step, which needs all of them. With few rows, every worker prepares its
// own copy of all: cheaper than a barrier.
inline Range rows_of(const Worker& worker, int64_t rows) {
  return rows < kFewRows ? Range{0, rows} : worker.share(rows);
}

// This worker's copy of `size` elements.
template <class E>
E* copy_of(const Worker& worker, int64_t rows, E* memory, int64_t size) {
  return rows < kFewRows ? memory + worker.index * size : memory;
}

// Number of copies.
inline int64_t num_copies(int64_t rows, int threads) { return rows < kFewRows ? threads : 1; }

// Tiles x [rows, width], of which this worker's rows are ready, and waits for the other workers' rows.
template <class T>
TiledActivations tile_activations(const Worker& worker, const T* x, const T* norm, float eps, int64_t rows,
                                  int64_t width, const Weight& weight, float* memory) {
  void* tiled = copy_of(worker, rows, memory, rows * padded(width));
  const Range own = rows_of(worker, rows);
  kernels<T>().tile(x, norm, eps, own.begin, own.end, rows, width, weight, tiled);
  if (rows >= kFewRows) worker.wait();
  return {tiled, rows, width};
}

inline int64_t tiled_size(int64_t rows, int64_t width) { return product(rows, padded(width)); }

}  // namespace lsk
