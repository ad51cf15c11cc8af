// verify_attention: its scratch, and what launches it, compiled in verify_attention.cu.
#pragma once

#include "cuda/common.h"

namespace lsk {

constexpr int kSplit = 128;  // positions of a block: fixed, as it fixes the order of additions
constexpr int kPairs = 16;   // (row, query head) pairs of a block

// The scratch of attention: what a call with these sizes needs at most.
struct AttentionScratch {
  int64_t pairs_per_row, splits, cells, tickets;
  int rows_at_once;

  // 64 MB, or half as much as a layer's cache has in 16 bit: a cache of long sequences would otherwise leave room for
  // one row a launch, and each launch reads all keys and values.
  static int64_t usual_limit(int64_t batch, int64_t num_kv_heads, int64_t capacity, int64_t head_dim) {
    constexpr int64_t kLeast = 64 << 20;
    const int64_t half = batch * num_kv_heads * capacity * head_dim * 2;
    return half > kLeast ? half : kLeast;
  }

  AttentionScratch(int64_t batch, int64_t rows, int64_t num_heads, int64_t num_kv_heads, int64_t capacity,
                   int64_t head_dim)
      : AttentionScratch(batch, rows, num_heads, num_kv_heads, capacity, head_dim,
                         usual_limit(batch, num_kv_heads, capacity, head_dim)) {}

  // Above `limit` bytes, the rows of a sequence are taken in several launches.
  AttentionScratch(int64_t batch, int64_t rows, int64_t num_heads, int64_t num_kv_heads, int64_t capacity,
                   int64_t head_dim, int64_t limit) {
    splits = divide_up<int64_t>(capacity, kSplit);
    const int64_t row_bytes = batch * num_heads * splits * (head_dim + 2) * static_cast<int64_t>(sizeof(float));
    const int64_t fits = limit / (row_bytes > 0 ? row_bytes : 1);
    rows_at_once = static_cast<int>(fits < 1 ? 1 : fits < rows ? fits : rows);
    pairs_per_row = num_kv_heads > 0 ? num_heads / num_kv_heads : 0;
    cells = batch * num_heads * splits * rows_at_once;
    tickets = batch * num_kv_heads * divide_up<int64_t>(rows_at_once * pairs_per_row, kPairs);
  }

  int64_t ticket_bytes() const { return divide_up<int64_t>(tickets * 4, 256) * 256; }
  int64_t peak_bytes() const { return divide_up<int64_t>(cells * 8, 256) * 256; }
  int64_t bytes(int64_t head_dim) const { return ticket_bytes() + peak_bytes() + cells * head_dim * 4; }
};

// Zeroes the tickets once; each attention leaves them zero.
cudaError_t clear_tickets(Chain& chain, const AttentionScratch& scratch, void* memory);

// Attention of q [R, H C] over the cache, to out [R, H C]; `memory`: scratch.bytes(C), 256 bytes aligned, its tickets
// zero.
template <class T>
cudaError_t verify_attention(Chain& chain, Rows<const T> q, const Cache<T>& cache, const AttentionScratch& scratch,
                             void* memory, Rows<T> out);

}  // namespace lsk
