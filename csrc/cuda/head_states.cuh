// Shared by the exit head kernels: the main loop of a block, its states in shared memory, sampling, and the reduction
// of a tile's logits. See exit_head.cu.
#pragma once

#include <algorithm>

#include "cuda/argmax_lse.cuh"
#include "cuda/exit_head.h"
#include "cuda/noise.cuh"
#include "cuda/rms_norm.cuh"

namespace lsk {

// States per pass over the weights, in groups of 16 as in linear_tile.cuh; fp32 has no registers for more than one
// group.
template <class T>
inline constexpr int kMaxStates = std::is_same_v<T, float> ? kTokens : 4 * kTokens;

template <class T>
struct HeadArgs {
  Head<T> head;
  Rows<const T> hidden;  // [R, D]
  int64_t rows;
  HeadSampling sampling;
  HeadLogits logits;
  ArgmaxLse* partial;  // [R, tiles]
  int64_t tiles;
  bool states_aligned = false;  // rows are aligned to 16 bytes
  int passes = 0, pass = 0;     // number of passes over the states, states per pass
  int parts = 0, width = 0;     // parts of a state, columns per part: one part at a time is in shared memory
  int stages = 0;               // stages of the ring, for weights that are not packed
  bool weight_aligned = false;  // their rows are aligned to 16 bytes

  __device__ __forceinline__ int columns(int part) const {
    return min(width, static_cast<int>(head.hidden_size) - part * width);
  }
};

// Calls launch_as(std::integral_constant<int, GROUPS>(), std::integral_constant<int, TILES>()) for the states of a
// pass: whole states use one tile per warp at a time, parts of states several.
template <class T, class Launch>
cudaError_t with_states(const HeadArgs<T>& a, Launch launch_as) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kMaxStates<T> / kTokens> all;
  constexpr std::integral_constant<int, 4> several;
  if (a.parts > 1) return launch_as(all, several);
  return a.pass > kTokens ? launch_as(all, one) : launch_as(one, one);
}

// The states and tiles of this block. Blocks of different passes over a tile run side by side, so that they share it in
// L2.
struct HeadWork {
  int64_t first, blocks, block,
      step;  // first state; number of blocks of this pass, index of this one, and stride of a warp's tiles
  int rows, warp;

  template <class T>
  __device__ __forceinline__ explicit HeadWork(const HeadArgs<T>& a)
      : first(static_cast<int64_t>(blockIdx.x % a.passes) * a.pass),
        blocks(gridDim.x / a.passes),
        block(blockIdx.x / a.passes),
        step(blocks * kWarps),
        rows(static_cast<int>(min(a.rows - first, static_cast<int64_t>(a.pass)))),
        warp(threadIdx.x / 32) {}

  // First tile of this warp, from the block's tile `begin` on.
  __device__ __forceinline__ int64_t own(int64_t begin) const { return begin + blocks * warp; }
};

// Order of a warp's tiles in its ring: whole tiles, or TILES together, the first part of each, then the second.
template <int TILES>
struct HeadWalk {
  int64_t tile, tiles, step;
  int parts, part = 0, done = 0;  // tiles done of this part

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

// Swizzled index of 16-byte piece `piece` of a row, so that rows g and g + 1, read together, are in different banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return piece ^ (row & 1) << 2; }

// One part of a pass's states in shared memory, zero past the width.
template <class T>
struct HeadStates {
  T* data;
  int width;

  __device__ __forceinline__ T* at(int row, int piece) const {
    return data + row * width + swizzled(row, piece) * kChunk<T>;
  }
};

// Sampling parameters of a pass's states; temperature 0 is greedy.
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
  to->position[r] = static_cast<uint64_t>(from.position[first + r]) + static_cast<uint64_t>(from.ahead);
}

template <class T>
__device__ __forceinline__ void prefetch_norm(const HeadArgs<T>& a) {
  for (int k = threadIdx.x * kChunk<T>; k < a.head.hidden_size; k += kThreads * kChunk<T>)
    ptx::prefetch_l2(a.head.norm_weight + k);
}

// Computes 1 / rms of the states.
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
    __syncthreads();  // scratch is free again, and the inverses are written
  }
}

// Loads a part of the normed states, rounded to T. All threads share the chunks of all rows, so that one state takes no
// longer than an eighth of eight.
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

// Reduces a tile's logits of eight states, from state `begin` on.
template <class T, int GROUPS>
__device__ __forceinline__ void fold_states(const HeadArgs<T>& a, const float (&sums)[4], int64_t tile, int64_t first,
                                            int begin, int rows, const PassSampling<GROUPS>& sampling) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int state = begin + 2 * t + part;
    ArgmaxLse best = empty_argmax_lse();
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
      merge(best, make_argmax_lse(logit, noise, static_cast<int>(row)));
    }
    for (int mask = 4; mask < 32; mask *= 2) merge_lane(best, mask);
    if (g == 0 && state < rows) a.partial[(first + state) * a.tiles + tile] = best;
  }
}

// The same for all states. Registers cannot be indexed at run time, and unrolling would be long: so the sums move up.
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

// Main loop of a block, whose warps have already begun to fetch tiles. stream.multiply(tile, part, states, rows,
// products) adds a part's products to those of a tile. Registers cannot be indexed at run time, so the tiles' products
// rotate.
template <int GROUPS, int TILES, class T, class Stream>
__device__ __forceinline__ void run_head(const HeadArgs<T>& a, const HeadWork& work, T* memory, Stream& stream) {
  __shared__ PassSampling<GROUPS> sampling;
  __shared__ float inverses[kMaxStates<T>];
  prefetch_norm(a);
  ptx::dependency_wait();
  load_inverses(a, work, inverses);
  load_sampling(a.sampling, work.first, work.rows, &sampling);
  const HeadStates<T> states{memory, a.width};
  typename Stream::Products products[TILES];
  const int parts = TILES == 1 ? 1 : a.parts;
  for (int64_t begin = work.block; begin < a.tiles; begin += TILES * work.step) {
    for (int part = 0; part < parts; ++part) {
      if (parts > 1 || begin == work.block) {
        __syncthreads();  // all have read the previous part
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

// Divides the states evenly among passes, and their columns, in units of `unit`, into parts that fit beside the
// smallest ring of `min_ring` bytes; one unit of 64 states fits on every GPU. Returns the bytes of a pass's states.
template <class T>
size_t plan_passes(HeadArgs<T>& a, int64_t unit, size_t available, size_t min_ring) {
  a.passes = static_cast<int>(divide_up<int64_t>(a.rows, kMaxStates<T>));
  a.pass = static_cast<int>(divide_up<int64_t>(a.rows, a.passes));
  const int64_t columns = std::max<int64_t>(a.head.hidden_size, 1), units = divide_up(columns, unit);
  const int64_t each = a.pass * unit * static_cast<int64_t>(sizeof(T));
  a.parts = static_cast<int>(divide_up<int64_t>(units, static_cast<int64_t>(available - min_ring) / each));
  a.width = static_cast<int>(divide_up<int64_t>(units, a.parts) * unit);
  return static_cast<size_t>(a.pass) * a.width * sizeof(T);
}

// Grid for all passes: limited by the processors per pass and by the tiles for all warps.
template <class T>
dim3 head_grid(const HeadArgs<T>& a, int processors) {
  const int64_t useful = divide_up<int64_t>(a.tiles, kWarps), fair = processors < a.passes ? 1 : processors / a.passes;
  return dim3(static_cast<unsigned>(a.passes * (fair < useful ? fair : useful)));
}

}  // namespace lsk
