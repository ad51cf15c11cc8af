// The exit head's launches, for what drafts and verifies: declared here, compiled in exit_head.cu.
#pragma once

#include "common/weight.h"
#include "cuda/choice.h"
#include "cuda/common.h"

namespace lsk {

// A head, in the dtype T of the states, as int8 with a scale a row, or packed.
template <class T>
struct Head {
  const T* norm_weight;      // [D]
  Weight weight;             // [V, D]
  const float* scale;        // [V], of int8 rows, or null
  const int64_t* token_map;  // [V] or null
  int64_t vocab_size, hidden_size;
  float eps;
};

// How rows are sampled; greedily without a temperature, and where it is 0.
struct HeadSampling {
  const float* temperature = nullptr;                  // [R]
  const int64_t *seed = nullptr, *position = nullptr;  // [R]
  int64_t ahead = 0;                                   // added to every position
};

struct HeadLogits {
  float* data = nullptr;  // fp32, row r at data + r * pitch; null: not wanted
  int64_t pitch = 0;
};

constexpr int kHeadTile = 16;  // vocabulary rows of a tile: the M of an mma

inline int64_t head_tiles(int64_t vocab_size) { return divide_up<int64_t>(vocab_size, kHeadTile); }

// Threads that merge the tiles of one row: whole warps; their number follows from the vocabulary alone.
constexpr int kMaxMergeThreads = 512;
inline int merge_threads(int64_t tiles) {
  return tiles < kMaxMergeThreads ? static_cast<int>(divide_up<int64_t>(tiles, 32)) * 32 : kMaxMergeThreads;
}

// Launch 1: reduces each vocabulary tile to a Choice, partial [R, tiles].
template <class T>
cudaError_t exit_head_tiles(Chain& chain, const Head<T>& head, Rows<const T> hidden, int64_t rows,
                            const HeadSampling& sampling, HeadLogits logits, Choice* partial);

// Launch 2: merges the tiles into token, logit and log-sum-exp, [R] each.
cudaError_t exit_head_merge(Chain& chain, const Choice* partial, int64_t rows, int64_t vocab_size,
                            const int64_t* token_map, int64_t* token, float* logit, float* logsumexp);

}  // namespace lsk
