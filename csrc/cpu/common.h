// Shared by the launchers of the CPU ops.
#pragma once

#include "common/checks.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace lsk {

constexpr int64_t kUnit = 16;  // weight rows that one thread takes at least

inline int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

using torch::stable::contiguous;

// Every position that a step writes must lie inside the cache.
inline void check_capacity(const int64_t* seq_lens, int64_t batch, int64_t rows, int64_t capacity) {
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(seq_lens[b] >= 0 && seq_lens[b] + rows <= capacity, "sequence ", b, " has length ", seq_lens[b],
                    ", ", rows, " more rows do not fit the cache's capacity ", capacity);
  }
}

// Sequences use distinct rows of the cache: those that `slots` names, or without it the first `batch`, which are all.
inline void check_slots(const int64_t* slots, int64_t batch, int64_t cached) {
  STD_TORCH_CHECK(slots || batch == cached, "k_cache has ", cached, " rows, expected ", batch);
  for (int64_t b = 0; slots && b < batch; ++b) {
    STD_TORCH_CHECK(0 <= slots[b] && slots[b] < cached, "slots[", b, "] is ", slots[b], ", expected one of [0, ",
                    cached, ")");
    for (int64_t other = 0; other < b; ++other)
      STD_TORCH_CHECK(slots[other] != slots[b], "slots[", other, "] and slots[", b, "] are both ", slots[b],
                      ", expected distinct rows of the cache");
  }
}

inline int64_t cache_row(const int64_t* slots, int64_t sequence) { return slots ? slots[sequence] : sequence; }

// Packs x [rows, width] into this member's own memory; each member needs all of it, and a copy is cheaper than a wait.
template <class T>
Packed pack_own(const Member& member, const T* x, const T* norm, float eps, int64_t rows, int64_t width,
                float* memory) {
  void* own = memory + member.index * rows * padded(width);
  kernels<T>().pack(x, norm, eps, rows, width, own);
  return {own, rows, width};
}

inline int64_t packed_size(int64_t rows, int64_t width) { return rows * padded(width); }

}  // namespace lsk
