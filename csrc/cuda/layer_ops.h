// Launchers of the ops of a decoder layer: rms_norm, linear, swiglu, rope_kv_append and verify_attention, each compiled
// in the .cu file of its name (swiglu: linear.cu).
#pragma once

#include "common/weight.h"
#include "cuda/common.h"

namespace lsk {

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, rows of `width`.
template <class T>
cudaError_t rms_norm(Chain& chain, Rows<const T> x, const T* weight, float eps, int64_t rows, int64_t width,
                     Rows<T> out);

// out [R, d_out] = x weight^T + bias + residual; weight [d_out, d_in], bias [d_out] and residual [R, d_out] may be
// null.
template <class T>
cudaError_t linear(Chain& chain, Rows<const T> x, const Weight& weight, const T* bias, Rows<const T> residual,
                   int64_t rows, int64_t d_in, int64_t d_out, Rows<T> out);

// out [R, F] = silu(y gate^T) * (y up^T), both of one format; y is x [R, D], or rms_norm(x) if `norm` [D] is given.
template <class T>
cudaError_t swiglu(Chain& chain, Rows<const T> x, const T* norm, float eps, const Weight& gate, const Weight& up,
                   int64_t rows, int64_t d_in, int64_t intermediate_size, Rows<T> out);

// cos and sin [>= T, C/2].
struct Angles {
  const float *cos, *sin;
};

// A row of q, k or v has its heads side by side. Null norms are skipped. A null v is already in the cache.
template <class T>
struct RopeArgs {
  Rows<const T> q, k, v;     // [R, H C], [R, G C] twice
  const T *q_norm, *k_norm;  // [C]
  float eps;
  Angles angles;
  Rows<T> q_out;  // [R, H C], may be q
  int num_heads;
};

// Rotates q and k, and writes k and v to the cache.
template <class T>
cudaError_t rope_kv_append(Chain& chain, const RopeArgs<T>& args, const Cache<T>& cache);

constexpr int kSplit = 128;  // positions of a block; fixed, so that the order of additions is
constexpr int kPairs = 16;   // (row, query head) pairs of a block

// Scratch sizes of attention.
struct AttentionScratch {
  int64_t pairs_per_row, splits, cells, tickets;
  int rows_at_once;

  // 64 MB, or half of a layer's cache in 16 bit. A smaller limit would allow only one row per launch for long
  // sequences, and each launch reads all keys and values.
  static int64_t usual_limit(int64_t batch, int64_t num_kv_heads, int64_t capacity, int64_t head_dim) {
    constexpr int64_t kMin = 64 << 20;
    const int64_t half = batch * num_kv_heads * capacity * head_dim * 2;
    return half > kMin ? half : kMin;
  }

  AttentionScratch(int64_t batch, int64_t rows, int64_t num_heads, int64_t num_kv_heads, int64_t capacity,
                   int64_t head_dim)
      : AttentionScratch(batch, rows, num_heads, num_kv_heads, capacity, head_dim,
                         usual_limit(batch, num_kv_heads, capacity, head_dim)) {}

  // Above `limit` bytes, the rows of a sequence are split into several launches.
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

// Zeroes the tickets; every attention launch leaves them zero.
cudaError_t clear_tickets(Chain& chain, const AttentionScratch& scratch, void* memory);

// Attention of q [R, H C] over the cache, to out [R, H C]. `memory` has scratch.bytes(C) bytes, 256-byte aligned, with
// zero tickets.
template <class T>
cudaError_t verify_attention(Chain& chain, Rows<const T> q, const Cache<T>& cache, const AttentionScratch& scratch,
                             void* memory, Rows<T> out);

}  // namespace lsk
