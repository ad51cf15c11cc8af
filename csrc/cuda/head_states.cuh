// What the kernels of the exit head share: states in shared memory, how they are drawn, and what becomes of a tile's
// logits. See exit_head.cuh.
#pragma once

#include "cuda/choice.cuh"
#include "cuda/exit_head.h"
#include "cuda/noise.cuh"
#include "cuda/rms_norm.cuh"

namespace lsk {

// Past the segments of a state in shared memory: the next one starts in other banks.
template <class T>
inline constexpr int kPitchPadding = 64 / sizeof(T);

template <class T>
struct HeadArgs {
  Head<T> head;
  Rows<const T> hidden;  // [R, D]
  int64_t rows;
  HeadSampling sampling;
  HeadLogits logits;
  Choice* partial;  // [R, tiles]
  int64_t tiles;
  int pitch = 0;                 // elements from one state to the next in shared memory
  bool states_aligned = false;   // rows start at multiples of 16 bytes
  int passes = 0, pass = 0;      // over the states, states a pass
  int segments = 0, stages = 0;  // of weights that are not packed: of a row, of a ring
  bool weight_aligned = false;   // the same of these
};

// How the states of a pass are drawn; temperature 0 is greedy.
struct PassSampling {
  float temperature[kTokens];
  NoiseKey noise[kTokens];
};

__device__ __forceinline__ void load_sampling(const HeadSampling& from, int64_t first, int rows, PassSampling* to) {
  const int r = threadIdx.x;
  if (r >= kTokens) return;
  const bool sampled = from.temperature != nullptr && r < rows;
  to->temperature[r] = sampled ? from.temperature[first + r] : 0.0f;
  if (sampled)
    to->noise[r] = {static_cast<uint64_t>(from.seed[first + r]),
                    static_cast<uint64_t>(from.position[first + r] + from.ahead), kDraftStream};
}

template <class T>
__device__ __forceinline__ void prefetch_norm(const HeadArgs<T>& a) {
  for (int k = threadIdx.x * kChunk<T>; k < a.head.hidden_size; k += kThreads * kChunk<T>)
    ptx::prefetch_l2(a.head.norm_weight + k);
}

// Normed states, rounded to T, zero past the width. All threads share the rows' chunks, so that one state takes no
// longer than an eighth of eight.
template <class T>
__device__ __forceinline__ void load_states(const HeadArgs<T>& a, int64_t first, int rows, T* states) {
  __shared__ float scratch[kWarps * kTokens];
  __shared__ float inverses[kTokens];
  const int hidden_size = static_cast<int>(a.head.hidden_size), chunks = (a.pitch - kPitchPadding<T>) / kChunk<T>;
  const Rows<const T> x{a.hidden.row(first), a.hidden.pitch};
  float inverse[2];
  inverse_rms(x, rows, hidden_size, a.head.eps, a.states_aligned, scratch, inverse);
  if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
    inverses[threadIdx.x / 4] = inverse[0];
    inverses[threadIdx.x / 4 + 8] = inverse[1];
  }
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * chunks; i += kThreads) {
    const int row = i / chunks, column = i % chunks * kChunk<T>;
    const Chunk<T> factors = load_chunk(a.head.norm_weight, column, hidden_size, a.states_aligned);
    *reinterpret_cast<Chunk<T>*>(states + row * a.pitch + column) =
        normed(load_chunk(x.row(row), column, hidden_size, a.states_aligned), inverses[row], factors);
  }
}

// What the tile leaves of each state's logits.
template <class T>
__device__ __forceinline__ void fold_tile(const HeadArgs<T>& a, const float (&sums)[2][4], int64_t tile, int64_t first,
                                          int rows, const PassSampling& sampling) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int n = part / 2, state = 8 * n + 2 * t + part % 2;
    if (8 * n >= rows) break;
    Choice best = no_choice();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = tile * kHeadTile + g + 8 * half;
      if (row >= a.head.vocab_size || state >= rows) continue;
      float logit = sums[n][part % 2 + 2 * half], noise = 0.0f;
      if (a.head.scale != nullptr) logit *= a.head.scale[row];
      if (a.logits.data != nullptr) a.logits.data[(first + state) * a.logits.pitch + row] = logit;
      if (sampling.temperature[state] > 0) {
        const int64_t token = a.head.token_map != nullptr ? a.head.token_map[row] : row;
        logit /= sampling.temperature[state];
        noise = sampling.noise[state].gumbel(static_cast<uint32_t>(token));
      }
      merge(best, choice_of(logit, noise, static_cast<int>(row)));
    }
    for (int mask = 4; mask < 32; mask *= 2) merge_lane(best, mask);
    if (g == 0 && state < rows) a.partial[(first + state) * a.tiles + tile] = best;
  }
}

// As many states as fit beside the smallest ring, of `least` bytes; 0 when not one fits. The bytes of all of them.
template <class T>
size_t plan_passes(HeadArgs<T>& a, size_t available, size_t least) {
  const size_t state = a.pitch * sizeof(T);
  if (available < least + state) return 0;
  const size_t fitting = (available - least) / state, wanted = a.rows < kTokens ? a.rows : kTokens;
  a.pass = static_cast<int>(fitting < wanted ? fitting : wanted);
  a.passes = static_cast<int>(divide_up<int64_t>(a.rows, a.pass));
  return a.pass * state;
}

// Blocks for all passes: of each as many as there are processors for, and tiles for their warps.
template <class T>
dim3 head_grid(const HeadArgs<T>& a, int processors) {
  const int64_t useful = divide_up<int64_t>(a.tiles, kWarps), fair = processors < a.passes ? 1 : processors / a.passes;
  return dim3(static_cast<unsigned>(a.passes * (fair < useful ? fair : useful)));
}

}  // namespace lsk
