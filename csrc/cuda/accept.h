// accept_greedy and accept_sampled: arguments and launchers, compiled in accept.cu.
#pragma once

#include "cuda/exit_head.h"

namespace lsk {

// draft is [B, K], target [B, K + 1], all others [B].
cudaError_t accept_greedy(Chain& chain, const int64_t* draft, const int64_t* target, int64_t* seq_lens,
                          int64_t* accepted, int64_t* next_token, int64_t batch, int64_t num_speculations);

constexpr int kAcceptTile = 4096;  // vocabulary entries per block

inline int accept_tiles(int64_t vocab_size, int64_t draft_vocab_size) {
  return static_cast<int>(
      divide_up<int64_t>(vocab_size > draft_vocab_size ? vocab_size : draft_vocab_size, kAcceptTile));
}

// Best score of a tile; the lowest token among equals.
struct ScoredToken {
  float key;
  int token;
};

struct SampleCandidates {
  ScoredToken residual, plain;
};

// Logits rows are contiguous; `tiles` is accept_tiles(...).
struct AcceptSampledArgs {
  const int64_t* draft;        // [B, K]
  const float* draft_logits;   // [B, K, Vd]
  const float* target_logits;  // [B, K + 1, V]
  int64_t* seq_lens;           // [B]
  const float* temperature;    // [B]
  const int64_t* seed;         // [B]
  const int64_t* token_map;    // [Vd] or null
  int64_t *accepted, *next_token;
  int64_t batch, num_speculations, draft_vocab_size, vocab_size;
  ArgmaxLse* rows;               // scratch [B, 2 K + 1, tiles]: the target's rows, then the draft's
  SampleCandidates* candidates;  // scratch [B, tiles]
  int* inverse;                  // scratch [V], with a token map: row of the draft head, or -1
  int tiles;

  __host__ __device__ int64_t rows_each() const { return 2 * num_speculations + 1; }
};

cudaError_t accept_sampled(Chain& chain, const AcceptSampledArgs& args);

}  // namespace lsk
