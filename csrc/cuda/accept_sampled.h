// accept_sampled: its arguments and what launches it, compiled in accept_sampled.cu.
#pragma once

#include "cuda/choice.h"
#include "cuda/common.h"

namespace lsk {

constexpr int kStretch = 4096;  // tokens of the vocabulary that one block takes

inline int accept_stretches(int64_t vocab_size, int64_t draft_vocab_size) {
  return static_cast<int>(divide_up<int64_t>(vocab_size > draft_vocab_size ? vocab_size : draft_vocab_size, kStretch));
}

// The best of a stretch; the lowest token among equals.
struct Best {
  float key;
  int token;
};

struct Pick {
  Best residual, plain;
};

// `stretches` as accept_stretches says; logits rows are contiguous.
struct SampledArgs {
  const int64_t* draft;        // [B, K]
  const float* draft_logits;   // [B, K, Vd]
  const float* target_logits;  // [B, K + 1, V]
  int64_t* seq_lens;           // [B]
  const float* temperature;    // [B]
  const int64_t* seed;         // [B]
  const int64_t* token_map;    // [Vd] or null
  int64_t *accepted, *next_token;
  int64_t batch, drafted, draft_vocab_size, vocab_size;
  Choice* rows;  // scratch [B, 2 K + 1, stretches]: of the target's rows, then of the draft's
  Pick* picks;   // scratch [B, stretches]
  int* inverse;  // scratch [V], with a token map: the row of the draft's head, or -1
  int stretches;

  __host__ __device__ int64_t rows_each() const { return 2 * drafted + 1; }
};

cudaError_t accept_sampled(Chain& chain, const SampledArgs& args);

}  // namespace lsk
