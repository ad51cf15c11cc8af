// Launchers of the exit head, compiled in exit_head.cu.
#pragma once

#include "common/weight.h"
#include "cuda/common.h"

namespace lsk {

// Partial reduction of a row of logits over a part of the vocabulary: arg-max and log-sum-exp.
struct ArgmaxLse {
  float key;    // the largest logit, or logit plus noise
  float value;  // the logit at the arg-max
  int row;      // its vocabulary row; the lowest among equals
  float peak;   // the largest logit
  float sum;    // sum of exp(logit - finite_or_zero(peak)); NaN or infinite if a logit is NaN or +inf
};

// An exit head; its weight has the dtype T of the states, is int8 with one scale per row, or packed.
template <class T>
struct Head {
  const T* norm_weight;      // [D]
  Weight weight;             // [V, D]
  const float* scale;        // [V] for int8 rows, or null
  const int64_t* token_map;  // [V] or null
  int64_t vocab_size, hidden_size;
  float eps;
};

// Sampling parameters of rows; greedy without a temperature, or where it is 0.
struct HeadSampling {
  const float* temperature = nullptr;                  // [R]
  const int64_t *seed = nullptr, *position = nullptr;  // [R]
  int64_t ahead = 0;                                   // added to every position
};

struct HeadLogits {
  float* data = nullptr;  // fp32, row r at data + r * pitch; null: not written
  int64_t pitch = 0;
};

constexpr int kHeadTile = 16;  // vocabulary rows per tile: M of an mma

inline int64_t head_tiles(int64_t vocab_size) { return divide_up<int64_t>(vocab_size, kHeadTile); }

// Threads that merge the tiles of one row: whole warps, their number depends on the vocabulary alone.
constexpr int kMaxMergeThreads = 512;
inline int merge_threads(int64_t tiles) {
  return tiles < kMaxMergeThreads ? static_cast<int>(divide_up<int64_t>(tiles, 32)) * 32 : kMaxMergeThreads;
}

// Launch 1: reduces each vocabulary tile, to partial [R, tiles].
template <class T>
cudaError_t exit_head_tiles(Chain& chain, const Head<T>& head, Rows<const T> hidden, int64_t rows,
                            const HeadSampling& sampling, HeadLogits logits, ArgmaxLse* partial);

// Launch 2: merges the tiles into token, logit and log-sum-exp, [R] each.
cudaError_t exit_head_merge(Chain& chain, const ArgmaxLse* partial, int64_t rows, int64_t vocab_size,
                            const int64_t* token_map, int64_t* token, float* logit, float* logsumexp);

}  // namespace lsk
