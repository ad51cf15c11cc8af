// Main loop of the matmuls: one block multiplies 16 (or twice 16) weight rows with up to 16, 32 or 64 rows of x.
//
// Batch 1 is memory-bound, so bytes in flight determine the block shape. With tiles of 16 rows, a 2048-row matrix has
// 128 blocks for the 132 SMs of an H100. The depth is split over the block's 8 warps, whose sums are added in warp
// order: split-K without a second kernel or an fp32 round trip. An SM's share of 3.35 TB/s is 25 GB/s, about 20 KB at
// 800 ns latency; with a ring of 64 KB even a third of the SMs saturates the bandwidth, so matrices with fewer rows are
// not split further. A depth of 2048 in 16 bit fits the ring: with programmatic dependent launch, all of it is in
// flight before the previous kernel has ended.
//
// Ring chunks are private to a lane: each lane reads the chunks that it copied, so the loop has no barrier. In memory a
// lane's 16 bytes are eight neighbouring columns; an mma expects columns {2t, 2t+1, 2t+8, 2t+9} from lane t. Columns of
// x and of the weights are permuted alike, so chunks are fragments without a shuffle: columns 0-3 feed one mma, 4-7
// another. The weights are the 16-row operand, tokens the 8-column one: up to eight tokens cost one mma, more cost two,
// with the same sums for a token in any column. More than 16 tokens form further groups of 16 in the same pass over the
// weights (GROUPS of 1, 2 or 4); separate passes would read the weights from L2 once per group.
#pragma once

#include "cuda/rms_norm.cuh"

namespace lsk {

constexpr int kTileRows = 16;

// Calls launch_as(std::integral_constant<int, GROUPS>) with the groups of 16 rows of x per block, for `rows` rows and
// weights W. fp32 has no registers for more than one group, and packed weights have no separate kernel for two.
template <class T, class W, class Launch>
cudaError_t with_groups(int64_t rows, Launch launch_as) {
  if constexpr (!std::is_same_v<T, float>) {
    if constexpr (std::is_same_v<T, W>)
      if (kTokens < rows && rows <= 2 * kTokens) return launch_as(std::integral_constant<int, 2>());
    if (kTokens < rows) return launch_as(std::integral_constant<int, 4>());
  }
  return launch_as(std::integral_constant<int, 1>());
}

// Minimum number of resident blocks per SM; one for the kernels that need most registers.
template <class T, class W, int TILES, int GROUPS>
constexpr int kResident =
    std::is_same_v<T, float> || TILES * GROUPS == 8 || (GROUPS > 1 && !std::is_same_v<T, W>) ? 1 : 2;

// Sums of a warp: rows g and g + 8 of a tile times tokens 2 t, 2 t + 1 (+ 8).
template <class T>
struct Sums {
  float d[2][4] = {};

  __device__ __forceinline__ void add(const Chunk<T>& low, const Chunk<T>& high, const Chunk<T> (&x)[2], int tokens) {
    uint32_t a[2][4], l[4], h[4];
    memcpy(l, &low, 16), memcpy(h, &high, 16);
#pragma unroll
    for (int k = 0; k < 2; ++k) a[k][0] = l[2 * k], a[k][1] = h[2 * k], a[k][2] = l[2 * k + 1], a[k][3] = h[2 * k + 1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && tokens <= 8) break;
      uint32_t b[2][2];
      memcpy(b, &x[half], 16);
      ptx::mma<T>(d[half], a[0], b[0]);
      ptx::mma<T>(d[half], a[1], b[1]);
    }
  }

  // Stores to parts[token][row], `pitch` floats per token.
  __device__ __forceinline__ void store(float* parts, int pitch, int tokens) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 8 + 2 * t + i % 2, row = g + i % 4 / 2 * 8;
      if (token < tokens) parts[token * pitch + row] = d[i / 4][i % 4];
    }
  }
};

// fp32 uses FMA: a lane sums its own columns for every token, and gets the tokens' chunks from other lanes by shuffles.
template <>
struct Sums<float> {
  float d[2][kTokens] = {};

  __device__ __forceinline__ void add(const Chunk<float>& low, const Chunk<float>& high, const Chunk<float> (&x)[2],
                                      int tokens) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= tokens) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float value = __shfl_sync(~0u, x[token / 8].at(e), token % 8 * 4 + t);
        d[0][token] = __fmaf_rn(low.at(e), value, d[0][token]);
        d[1][token] = __fmaf_rn(high.at(e), value, d[1][token]);
      }
    }
  }

  __device__ __forceinline__ void store(float* parts, int pitch, int tokens) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2 * kTokens; ++i) {
      if (i / 2 >= tokens) break;
      const float sum = quad_sum(d[i % 2][i / 2]);
      if (t == 0) parts[i / 2 * pitch + g + i % 2 * 8] = sum;
    }
  }
};

// Input of a matmul: x, or rms_norm(x) if `norm` is given.
template <class T>
struct Input {
  Rows<const T> x;          // [R, d_in]
  const T* norm = nullptr;  // [d_in]
  float eps = 0;
  int64_t rows = 0;
  int d_in = 0;
  bool aligned = false;  // x, norm and the weights are aligned to 16 bytes
};

// Input from x [R, d_in]. The caller must clear `aligned` if the weights are not aligned.
template <class T>
Input<T> input(Rows<const T> x, const T* norm, float eps, int64_t rows, int64_t d_in) {
  const bool aligned = x.aligned() && (norm == nullptr || is_aligned(norm, d_in));
  return {x, norm, eps, rows, static_cast<int>(d_in), aligned};
}

// The rows of x and the tile of a block. Blocks of one tile are neighbours, so that they share it in L2.
struct TileWork {
  int64_t first;
  int tokens, tile;

  // With up to `max_rows` rows of x per block.
  __device__ TileWork(int64_t rows, int max_rows) {
    const unsigned parts = static_cast<unsigned>(divide_up<int64_t>(rows, max_rows));
    first = static_cast<int64_t>(blockIdx.x % parts) * max_rows;
    tokens = static_cast<int>(min(rows - first, static_cast<int64_t>(max_rows)));
    tile = static_cast<int>(blockIdx.x / parts);
  }

  static dim3 grid(int64_t rows, int max_rows, int64_t tiles) {
    return dim3(static_cast<unsigned>(divide_up<int64_t>(rows, max_rows) * tiles));
  }
};

// Shared memory of a block that streams TILES tiles at once: per warp a ring of the weights, whose memory its sums
// reuse.
template <class Ring, int TILES, int GROUPS>
struct StreamMemory {
  static constexpr int kPitch = 20;  // floats per token; avoids bank conflicts

  union Warp {
    alignas(16) Ring ring;
    float sums[TILES][GROUPS * kTokens * kPitch];
  };
  Warp warps[kWarps];

  // Sum over all warps, in order, for a row of a tile and a token.
  __device__ __forceinline__ float total(int tile, int row, int token) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warps[w].sums[tile][token * kPitch + row];
    return sum;
  }
};

template <class T, int TILES, int GROUPS>
struct TileMemory : StreamMemory<Chunk<T>[8 / TILES][2 * TILES][32], TILES, GROUPS> {
  static constexpr int kStages = 8 / TILES;
  Chunk<T> norm[kWarps][kStages][4];
  float scratch[GROUPS][kWarps * kTokens];  // of inverse_rms
};

__device__ __forceinline__ float finish(float sum, float bias, float residual) { return sum + bias + residual; }

// Streams TILES tiles of weights past a block's rows of x. Usage: construct, prefetch() (reads only weights and norm),
// ptx::dependency_wait(), run(), then memory.total(). Base of TileStream and PackedStream: Stream::multiply(inverse,
// sums) adds the products; Stream::kAligned: x and the norm are always aligned.
template <class Stream, class T, class Accumulator, class Memory_, int TILES, int GROUPS>
struct StreamBase {
  using Memory = Memory_;

  const Input<T>& in;
  Memory& memory;
  const Rows<const T> x;  // from the block's first row on
  const int tokens, lane, warp, g, t;

  __device__ __forceinline__ StreamBase(const Input<T>& input, int64_t first, int count, Memory& shared)
      : in(input),
        memory(shared),
        x{input.x.row(first), input.x.pitch},
        tokens(count),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(lane / 4),
        t(lane % 4) {}

  // Ends with a __syncthreads().
  __device__ __forceinline__ void run() {
    float inverse[GROUPS][2];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      if (!in.norm || left(group) <= 0) break;
      const Rows<const T> rows{x.row(group * kTokens), x.pitch};
      inverse_rms(rows, left(group), in.d_in, in.eps, Stream::kAligned || in.aligned, memory.scratch[group],
                  inverse[group]);
    }
    Accumulator sums[TILES][GROUPS];
    static_cast<Stream*>(this)->multiply(inverse, sums);
    __syncwarp();  // the sums reuse the memory of the warp's ring
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int group = 0; group < GROUPS; ++group)
        sums[tile][group].store(memory.warps[warp].sums[tile] + group * kTokens * Memory::kPitch, Memory::kPitch,
                                left(group));
    __syncthreads();
  }

 protected:
  // Number of rows of x from the first one of a group on.
  __device__ __forceinline__ int left(int group) const { return tokens - group * kTokens; }
};

// The stream of plain weights.
template <class T, int TILES, int GROUPS>
struct TileStream : StreamBase<TileStream<T, TILES, GROUPS>, T, Sums<T>, TileMemory<T, TILES, GROUPS>, TILES, GROUPS> {
  using Memory = TileMemory<T, TILES, GROUPS>;
  using Base = StreamBase<TileStream, T, Sums<T>, Memory, TILES, GROUPS>;
  using Base::in, Base::memory, Base::x, Base::tokens, Base::lane, Base::warp, Base::g, Base::t, Base::left;
  using Matrix = const T*;
  static constexpr bool kAligned = false;
  static constexpr int kStages = Memory::kStages, kAhead = TILES * GROUPS >= 4 ? 1 : 2;

  const int own;
  // This lane's weight rows: of each tile row g, then row g + 8.
  const T* weight[2 * TILES];

  __device__ __forceinline__ TileStream(const Input<T>& input, Matrix, int64_t first, int count, Memory& shared)
      : Base(input, first, count, shared), own(own_steps<T>(input.d_in, warp)) {}

  // Makes row n of a matrix this lane's row r.
  __device__ __forceinline__ void take(int r, Matrix matrix, int n) {
    weight[r] = matrix + static_cast<int64_t>(n) * in.d_in;
  }

  __device__ __forceinline__ void prefetch() { in.aligned ? prefetch_as<true>() : prefetch_as<false>(); }

  __device__ __forceinline__ void multiply(const float (&inverse)[GROUPS][2], Sums<T> (&sums)[TILES][GROUPS]) {
    in.aligned ? multiply_as<true>(inverse, sums) : multiply_as<false>(inverse, sums);
  }

 private:
  // Copies step i of the weights and the norm to the ring. Always commits a group, so that groups can be counted.
  template <bool Aligned>
  __device__ __forceinline__ void fetch(int i) {
    if (i < own) {
      const int column = own_column<T>(i, warp, t), stage = i % kStages;
#pragma unroll
      for (int r = 0; r < 2 * TILES; ++r)
        copy_chunk<Aligned>(&memory.warps[warp].ring[stage][r][lane], weight[r], column, in.d_in);
      if (in.norm && g == 0) copy_chunk<Aligned>(&memory.norm[warp][stage][t], in.norm, column, in.d_in);
    }
    ptx::cp_async_commit();
  }

  template <bool Aligned>
  __device__ __forceinline__ void prefetch_as() {
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) fetch<Aligned>(i);
  }

  // Loads step i of the rows g and g + 8 of a group. Results of missing tokens are ignored later.
  template <bool Aligned>
  __device__ __forceinline__ void load(int i, int group, Chunk<T> (&chunks)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * kTokens + g + 8 * half;
      const bool inside = i < own && row < tokens;
      chunks[half] = load_chunk<Aligned>(x.row(row), own_column<T>(i, warp, t), inside ? in.d_in : 0);
    }
  }

  // Multiplies step i of the weights and of x, then loads x of step i + kAhead into the same registers.
  template <bool Aligned>
  __device__ __forceinline__ void step(int i, Chunk<T> (&chunks)[GROUPS][2], const float (&inverse)[GROUPS][2],
                                       Sums<T> (&sums)[TILES][GROUPS]) {
    ptx::cp_async_wait<kStages - 1>();
    if (in.norm) __syncwarp();  // the norm's chunks are shared by the warp
    const auto& ring = memory.warps[warp].ring[i % kStages];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      if (group > 0 && left(group) <= 0) break;
      if (in.norm) {
        const Chunk<T> factors = memory.norm[warp][i % kStages][t];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (8 * half < left(group)) chunks[group][half] = normed(chunks[group][half], inverse[group][half], factors);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        sums[tile][group].add(ring[2 * tile][lane], ring[2 * tile + 1][lane], chunks[group], left(group));
      if (GROUPS > 1) load<Aligned>(i + kAhead, group, chunks[group]);
    }
    if (in.norm) __syncwarp();
    fetch<Aligned>(i + kStages);
    if (GROUPS == 1) load<Aligned>(i + kAhead, 0, chunks[0]);
  }

  template <bool Aligned>
  __device__ __forceinline__ void multiply_as(const float (&inverse)[GROUPS][2], Sums<T> (&sums)[TILES][GROUPS]) {
    Chunk<T> ahead[kAhead][GROUPS][2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) load<Aligned>(i, group, ahead[i][group]);
    for (int begin = 0; begin < own; begin += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i >= own) break;
        step<Aligned>(begin + i, ahead[i], inverse, sums);
      }
    }
  }
};

}  // namespace lsk
