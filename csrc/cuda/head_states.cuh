// What the kernels of the exit head share: the way of a block, its states in shared memory, how they are drawn, and
// what becomes of a tile's logits. See exit_head.cuh.
#pragma once

#include <algorithm>

#include "cuda/choice.cuh"
#include "cuda/exit_head.h"
#include "cuda/noise.cuh"
#include "cuda/rms_norm.cuh"

namespace lsk {

// States that a block takes in one pass over its weights, in groups of 16 as linear_tile.cuh does; fp32 has no
// registers for more than one of these.
template <class T>
inline constexpr int kMostStates = std::is_same_v<T, float> ? kTokens : 4 * kTokens;

template <class T>
struct HeadArgs {
  Head<T> head;
  Rows<const T> hidden;  // [R, D]
  int64_t rows;
  HeadSampling sampling;
  HeadLogits logits;
  Choice* partial;  // [R, tiles]
  int64_t tiles;
  bool states_aligned = false;  // rows start at multiples of 16 bytes
  int passes = 0, pass = 0;     // over the states, states a pass
  int parts = 0, width = 0;     // of a state, columns a part: one part at a time lies in shared memory
  int stages = 0;               // of a ring of weights that are not packed
  bool weight_aligned = false;  // the same of these

  __device__ __forceinline__ int columns(int part) const {
    return min(width, static_cast<int>(head.hidden_size) - part * width);
  }
};

// launch_as(std::integral_constant<int, GROUPS>(), std::integral_constant<int, TILES>()) of a kernel that takes the
// states of a pass: whole ones with one tile of a warp at a time, parts of them with several.
template <class T, class Launch>
cudaError_t with_states(const HeadArgs<T>& a, Launch launch_as) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kMostStates<T> / kTokens> most;
  constexpr std::integral_constant<int, 4> several;
  if (a.parts > 1) return launch_as(most, several);
  return a.pass > kTokens ? launch_as(most, one) : launch_as(one, one);
}

// Which states and tiles are whose: blocks share the passes, so that those over a tile run side by side and meet in L2.
struct HeadWork {
  int64_t first, teams, team, step;  // the first state; of this pass: blocks, this one, and the tiles of all warps
  int rows, warp;

  template <class T>
  __device__ __forceinline__ explicit HeadWork(const HeadArgs<T>& a)
      : first(static_cast<int64_t>(blockIdx.x % a.passes) * a.pass),
        teams(gridDim.x / a.passes),
        team(blockIdx.x / a.passes),
        step(teams * kWarps),
        rows(static_cast<int>(min(a.rows - first, static_cast<int64_t>(a.pass)))),
        warp(threadIdx.x / 32) {}

  // The first tile of this warp among those that the block takes from `begin` on.
  __device__ __forceinline__ int64_t own(int64_t begin) const { return begin + teams * warp; }
};

// A warp's tiles in the order in which its ring has them: whole ones, or TILES together, the first part of each, then
// the second.
template <int TILES>
struct HeadWalk {
  int64_t tile, tiles, step;
  int parts, part = 0, done = 0;  // tiles of this part

  __device__ __forceinline__ void next() {
    tile += step;
    if (TILES == 1 || (++done < TILES && tile < tiles)) return;
    if (++part == parts) {
      part = 0;
    } else {
      tile -= done * step;
    }
    done = 0;
  }
};

// Where the 16 bytes number `piece` of a row lie in it: those of rows g and g + 1, read together, in different banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return piece ^ (row & 1) << 2; }

// One part of the states of a pass in shared memory, zero past the width.
template <class T>
struct HeadStates {
  T* data;
  int width;

  __device__ __forceinline__ T* at(int row, int piece) const {
    return data + row * width + swizzled(row, piece) * kChunk<T>;
  }
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

// What normed states are multiplied by.
template <class T>
__device__ __forceinline__ void load_inverses(const HeadArgs<T>& a, const HeadWork& work, float* inverses) {
  __shared__ float scratch[kWarps * kTokens];
#pragma unroll 1
  for (int begin = 0; begin < work.rows; begin += kTokens) {
    const Rows<const T> group{a.hidden.row(work.first + begin), a.hidden.pitch};
    float inverse[2];
    inverse_rms(group, work.rows - begin, static_cast<int>(a.head.hidden_size), a.head.eps, a.states_aligned, scratch,
                inverse);
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
      inverses[begin + threadIdx.x / 4] = inverse[0];
      inverses[begin + threadIdx.x / 4 + 8] = inverse[1];
    }
    __syncthreads();  // scratch is free again, and in the end inverses are there
  }
}

// A part of the normed states, rounded to T. All threads share the rows' chunks, so that one state takes no longer than
// an eighth of eight.
template <class T>
__device__ __forceinline__ void load_states(const HeadArgs<T>& a, const HeadWork& work, int part, const float* inverses,
                                            const HeadStates<T>& states) {
  const int hidden_size = static_cast<int>(a.head.hidden_size), chunks = a.width / kChunk<T>;
#pragma unroll 4
  for (int i = threadIdx.x; i < work.rows * chunks; i += kThreads) {
    const int row = i / chunks, piece = i % chunks, column = part * a.width + piece * kChunk<T>;
    const Chunk<T> factors = load_chunk(a.head.norm_weight, column, hidden_size, a.states_aligned);
    const Chunk<T> x = load_chunk(a.hidden.row(work.first + row), column, hidden_size, a.states_aligned);
    *reinterpret_cast<Chunk<T>*>(states.at(row, piece)) = normed(x, inverses[row], factors);
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

// The way of a block, whose warps have tiles on their way already: stream.multiply(tile, part, states, rows, products)
// adds a part's products to those of a tile. Registers have no index at run time, so the tiles' products take turns.
template <int GROUPS, int TILES, class T, class Stream>
__device__ __forceinline__ void run_head(const HeadArgs<T>& a, const HeadWork& work, T* memory, Stream& stream) {
  __shared__ PassSampling<GROUPS> sampling;
  __shared__ float inverses[kMostStates<T>];
  prefetch_norm(a);
  ptx::dependency_wait();
  load_inverses(a, work, inverses);
  load_sampling(a.sampling, work.first, work.rows, &sampling);
  const HeadStates<T> states{memory, a.width};
  typename Stream::Products products[TILES];
  const int parts = TILES == 1 ? 1 : a.parts;
  for (int64_t begin = work.team; begin < a.tiles; begin += TILES * work.step) {
    for (int part = 0; part < parts; ++part) {
      if (parts > 1 || begin == work.team) {
        __syncthreads();  // all have read the part before
        load_states(a, work, part, inverses, states);
        __syncthreads();
      }
#pragma unroll 1
      for (int n = 0; n < TILES; ++n) {
        if (const int64_t tile = work.own(begin) + n * work.step; tile < a.tiles) {
          stream.multiply(tile, part, states, work.rows, products[0]);
          if (part + 1 == parts) {
            float sums[2 * GROUPS][4] = {};
            products[0].row_sums(sums);
            fold_tile(a, sums, tile, work.first, work.rows, sampling);
            products[0] = {};
          }
        }
        const auto first = products[0];
#pragma unroll
        for (int i = 1; i < TILES; ++i) products[i - 1] = products[i];
        products[TILES - 1] = first;
      }
    }
  }
}

// Shares the states out evenly over the passes, and of their columns, in units of `unit`, as many to a part as fit
// beside the smallest ring, of `least` bytes: a unit of 64 states does on every card. The bytes of a pass.
template <class T>
size_t plan_passes(HeadArgs<T>& a, int64_t unit, size_t available, size_t least) {
  a.passes = static_cast<int>(divide_up<int64_t>(a.rows, kMostStates<T>));
  a.pass = static_cast<int>(divide_up<int64_t>(a.rows, a.passes));
  const int64_t columns = std::max<int64_t>(a.head.hidden_size, 1), units = divide_up(columns, unit);
  const int64_t each = a.pass * unit * static_cast<int64_t>(sizeof(T));
  a.parts = static_cast<int>(divide_up<int64_t>(units, static_cast<int64_t>(available - least) / each));
  a.width = static_cast<int>(divide_up<int64_t>(units, a.parts) * unit);
  return static_cast<size_t>(a.pass) * a.width * sizeof(T);
}

// Blocks for all passes: of each as many as there are processors for, and tiles for their warps.
template <class T>
dim3 head_grid(const HeadArgs<T>& a, int processors) {
  const int64_t useful = divide_up<int64_t>(a.tiles, kWarps), fair = processors < a.passes ? 1 : processors / a.passes;
  return dim3(static_cast<unsigned>(a.passes * (fair < useful ? fair : useful)));
}

}  // namespace lsk
