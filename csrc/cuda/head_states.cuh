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

// States that a block takes in one pass over its weights, in groups of 16 as linear_tile.cuh does; fp32 has no
// registers for more than one of these.
template <class T>
inline constexpr int kMostStates = std::is_same_v<T, float> ? kTokens : 4 * kTokens;

// launch_as(std::integral_constant<int, GROUPS>) of a kernel that takes so many states a pass.
template <class T, class Launch>
cudaError_t with_states(int pass, Launch launch_as) {
  if constexpr (kMostStates<T> > kTokens)
    if (pass > kTokens) return launch_as(std::integral_constant<int, kMostStates<T> / kTokens>());
  return launch_as(std::integral_constant<int, 1>());
}

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
template <int GROUPS>
struct PassSampling {
  float temperature[GROUPS * kTokens];
  uint64_t seed[GROUPS * kTokens], position[GROUPS * kTokens];

  __device__ __forceinline__ float gumbel(int state, uint32_t token) const {
    return NoiseKey{seed[state], position[state], kDraftStream}.gumbel(token);
  }
};

template <int GROUPS>
__device__ __forceinline__ void load_sampling(const HeadSampling& from, int64_t first, int rows,
                                              PassSampling<GROUPS>* to) {
  const int r = threadIdx.x;
  if (r >= GROUPS * kTokens) return;
  const bool sampled = from.temperature != nullptr && r < rows;
  to->temperature[r] = sampled ? from.temperature[first + r] : 0.0f;
  if (!sampled) return;
  to->seed[r] = static_cast<uint64_t>(from.seed[first + r]);
  to->position[r] = static_cast<uint64_t>(from.position[first + r] + from.ahead);
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
  __shared__ float inverses[kMostStates<T>];
  const int hidden_size = static_cast<int>(a.head.hidden_size), chunks = (a.pitch - kPitchPadding<T>) / kChunk<T>;
  const Rows<const T> x{a.hidden.row(first), a.hidden.pitch};
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += kTokens) {
    const Rows<const T> group{x.row(begin), x.pitch};
    float inverse[2];
    inverse_rms(group, rows - begin, hidden_size, a.head.eps, a.states_aligned, scratch, inverse);
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
      inverses[begin + threadIdx.x / 4] = inverse[0];
      inverses[begin + threadIdx.x / 4 + 8] = inverse[1];
    }
    __syncthreads();  // scratch is free again, and in the end inverses are there
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * chunks; i += kThreads) {
    const int row = i / chunks, column = i % chunks * kChunk<T>;
    const Chunk<T> factors = load_chunk(a.head.norm_weight, column, hidden_size, a.states_aligned);
    *reinterpret_cast<Chunk<T>*>(states + row * a.pitch + column) =
        normed(load_chunk(x.row(row), column, hidden_size, a.states_aligned), inverses[row], factors);
  }
}

// What the tile leaves of the logits of eight states, of which `begin` is the first.
template <class T, int GROUPS>
__device__ __forceinline__ void fold_states(const HeadArgs<T>& a, const float (&sums)[4], int64_t tile, int64_t first,
                                            int begin, int rows, const PassSampling<GROUPS>& sampling) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int state = begin + 2 * t + part;
    Choice best = no_choice();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = tile * kHeadTile + g + 8 * half;
      if (row >= a.head.vocab_size || state >= rows) continue;
      float logit = sums[part + 2 * half], noise = 0.0f;
      if (a.head.scale != nullptr) logit *= a.head.scale[row];
      if (a.logits.data != nullptr) a.logits.data[(first + state) * a.logits.pitch + row] = logit;
      if (sampling.temperature[state] > 0) {
        const int64_t token = a.head.token_map != nullptr ? a.head.token_map[row] : row;
        logit /= sampling.temperature[state];
        noise = sampling.gumbel(state, static_cast<uint32_t>(token));
      }
      merge(best, choice_of(logit, noise, static_cast<int>(row)));
    }
    for (int mask = 4; mask < 32; mask *= 2) merge_lane(best, mask);
    if (g == 0 && state < rows) a.partial[(first + state) * a.tiles + tile] = best;
  }
}

// The same of all states. Registers have no index at run time, and the code of a fold is long: so the sums move up.
template <class T, int GROUPS>
__device__ __forceinline__ void fold_tile(const HeadArgs<T>& a, float (&sums)[2 * GROUPS][4], int64_t tile,
                                          int64_t first, int rows, const PassSampling<GROUPS>& sampling) {
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += 8) {
    fold_states(a, sums[0], tile, first, begin, rows, sampling);
#pragma unroll
    for (int i = 4; i < 8 * GROUPS; ++i) sums[i / 4 - 1][i % 4] = sums[i / 4][i % 4];
  }
}

// As many states as fit beside the smallest ring, of `least` bytes, shared out evenly over the passes; 0 when not one
// fits. The bytes of a pass.
template <class T>
size_t plan_passes(HeadArgs<T>& a, size_t available, size_t least) {
  const size_t state = a.pitch * sizeof(T);
  if (available < least + state) return 0;
  const int64_t fitting = static_cast<int64_t>((available - least) / state), most = kMostStates<T>;
  a.passes = static_cast<int>(divide_up<int64_t>(a.rows, fitting < most ? fitting : most));
  a.pass = static_cast<int>(divide_up<int64_t>(a.rows, a.passes));
  return a.pass * state;
}

// Blocks for all passes: of each as many as there are processors for, and tiles for their warps.
template <class T>
dim3 head_grid(const HeadArgs<T>& a, int processors) {
  const int64_t useful = divide_up<int64_t>(a.tiles, kWarps), fair = processors < a.passes ? 1 : processors / a.passes;
  return dim3(static_cast<unsigned>(a.passes * (fair < useful ? fair : useful)));
}

}  // namespace lsk
