// The loop that streams weights: 16 (or twice 16) weight rows times up to 16, 32 or 64 rows of x, by one block.
//
// Batch 1 is bound by memory, so the shape of a block follows from bytes in flight. A tile of 16 rows gives a
// 2048-row matrix 128 blocks, one for each of an H100's 132 SMs; its depth is split over the block's 8 warps, whose
// sums are added in the order of the warps (the split of K needs no second kernel and no fp32 round trip). An SM's
// share of 3.35 TB/s is 25 GB/s, some 20 KB at 800 ns; a ring of 64 KB lets even a third of the SMs draw the full
// bandwidth, so matrices of fewer rows are not cut further. A depth of 2048 in 16 bit fits the ring whole: with
// programmatic dependent launch all of it is on its way before the kernel ahead has ended.
//
// The chunks of the ring are private to a lane: who copies a chunk reads it, so the loop has no barrier. In memory a
// lane's 16 bytes are eight neighbouring columns; an mma wants columns {2t, 2t+1, 2t+8, 2t+9} from lane t. Columns of x
// and of the weights are permuted alike, so chunks are fragments as they are: columns 0-3 feed one mma, 4-7 another.
// The weights are the 16-row operand, tokens the 8-column one: eight tokens or fewer cost one mma, more cost two, and
// a token's sums are the same in both, and wherever it stands. More than 16 tokens are further groups of 16, which a
// block takes in the same pass over its weights (GROUPS of 1, 2 or 4): else L2 would deliver these once for each group.
#pragma once

#include "cuda/rms_norm.cuh"

namespace lsk {

constexpr int kTileRows = 16;

// launch_as(std::integral_constant<int, GROUPS>), the groups of 16 rows of x that a block takes at once, of a launch
// with so many rows and weights W. fp32 has no registers for two, and packed weights have no kernel of their own for
// two.
template <class T, class W, class Launch>
cudaError_t with_groups(int64_t rows, Launch launch_as) {
  if constexpr (!std::is_same_v<T, float>) {
    if constexpr (std::is_same_v<T, W>)
      if (kTokens < rows && rows <= 2 * kTokens) return launch_as(std::integral_constant<int, 2>());
    if (kTokens < rows) return launch_as(std::integral_constant<int, 4>());
  }
  return launch_as(std::integral_constant<int, 1>());
}

// Blocks that an SM must hold: those whose sums and x take most registers are content with one.
template <class T, class W, int TILES, int GROUPS>
constexpr int kResident =
    std::is_same_v<T, float> || TILES * GROUPS == 8 || (GROUPS > 1 && !std::is_same_v<T, W>) ? 1 : 2;

// The sums of a warp: rows g and g + 8 of a tile times tokens 2 t, 2 t + 1 (+ 8).
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

  // To parts[token][row], `pitch` floats a token.
  __device__ __forceinline__ void store(float* parts, int pitch, int tokens) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 8 + 2 * t + i % 2, row = g + i % 4 / 2 * 8;
      if (token < tokens) parts[token * pitch + row] = d[i / 4][i % 4];
    }
  }
};

// fp32 by FMA: a lane sums its own columns for every token and reads the tokens' chunks from its quad's neighbours.
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

// What a block's rows of x are multiplied with: x, or rms_norm(x) where there is a norm.
template <class T>
struct Input {
  Rows<const T> x;          // [R, d_in]
  const T* norm = nullptr;  // [d_in]
  float eps = 0;
  int64_t rows = 0;
  int d_in = 0;
  bool aligned = false;  // x, norm and the weights can be read 16 bytes at a time
};

// x [R, d_in] as the products take it, rms_norm(x) where there is a norm; weights may yet make it not aligned.
template <class T>
Input<T> input(Rows<const T> x, const T* norm, float eps, int64_t rows, int64_t d_in) {
  const bool aligned = x.aligned() && (norm == nullptr || is_aligned(norm, d_in));
  return {x, norm, eps, rows, static_cast<int>(d_in), aligned};
}

// The rows of x that a block takes, and its tile: blocks of one tile are neighbours, so that they share it in L2.
struct TileWork {
  int64_t first;
  int tokens, tile;

  // Of `most` rows at a time.
  __device__ TileWork(int64_t rows, int most) {
    const unsigned parts = static_cast<unsigned>(divide_up<int64_t>(rows, most));
    first = static_cast<int64_t>(blockIdx.x % parts) * most;
    tokens = static_cast<int>(min(rows - first, static_cast<int64_t>(most)));
    tile = static_cast<int>(blockIdx.x / parts);
  }

  static dim3 grid(int64_t rows, int most, int64_t tiles) {
    return dim3(static_cast<unsigned>(divide_up<int64_t>(rows, most) * tiles));
  }
};

// Shared memory of a block that streams TILES tiles at once.
template <class T, int TILES, int GROUPS>
struct TileMemory {
  static constexpr int kStages = 8 / TILES, kPitch = 20;  // a pitch of 20 floats spreads a warp's sums over the banks

  struct Warp {
    union {
      Chunk<T> ring[kStages][2 * TILES][32];
      float sums[TILES][GROUPS * kTokens * kPitch];
    };
  };
  Warp warps[kWarps];
  Chunk<T> norm[kWarps][kStages][4];
  float scratch[GROUPS][kWarps * kTokens];

  // Of row `row` of a tile and a token, all warps: the ordered end of the split depth.
  __device__ __forceinline__ float total(int tile, int row, int token) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warps[w].sums[tile][token * kPitch + row];
    return sum;
  }
};

__device__ __forceinline__ float finish(float sum, float bias, float residual) { return sum + bias + residual; }

// One block's stream of TILES tiles past its rows of x. In order: construct, prefetch() (touches nothing but weights
// and norm), ptx::dependency_wait(), run(), then the totals in `memory`.
template <class T, int TILES, int GROUPS>
struct TileStream {
  using Memory = TileMemory<T, TILES, GROUPS>;
  using Matrix = const T*;
  static constexpr int kStages = Memory::kStages, kAhead = TILES * GROUPS >= 4 ? 1 : 2;

  const Input<T>& in;
  Memory& memory;
  const Rows<const T> x;  // from the block's first row on
  const int tokens, lane, warp, g, t, own;
  // This lane's weight rows: of each tile row g, then row g + 8.
  const T* weight[2 * TILES];

  __device__ __forceinline__ TileStream(const Input<T>& input, Matrix, int64_t first, int count, Memory& shared)
      : in(input),
        memory(shared),
        x{input.x.row(first), input.x.pitch},
        tokens(count),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(lane / 4),
        t(lane % 4),
        own(own_blocks<T>(input.d_in, warp)) {}

  // Row n of a matrix is this lane's row r.
  __device__ __forceinline__ void take(int r, Matrix matrix, int n) {
    weight[r] = matrix + static_cast<int64_t>(n) * in.d_in;
  }

  __device__ __forceinline__ void prefetch() { in.aligned ? prefetch_as<true>() : prefetch_as<false>(); }

  // Ends with a __syncthreads().
  __device__ __forceinline__ void run() {
    float inverse[GROUPS][2];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      if (!in.norm || left(group) <= 0) break;
      const Rows<const T> rows{x.row(group * kTokens), x.pitch};
      inverse_rms(rows, left(group), in.d_in, in.eps, in.aligned, memory.scratch[group], inverse[group]);
    }
    Sums<T> sums[TILES][GROUPS];
    in.aligned ? multiply<true>(inverse, sums) : multiply<false>(inverse, sums);
    __syncwarp();  // the sums take the place of the warp's ring
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int group = 0; group < GROUPS; ++group)
        sums[tile][group].store(memory.warps[warp].sums[tile] + group * kTokens * Memory::kPitch, Memory::kPitch,
                                left(group));
    __syncthreads();
  }

 private:
  // How many rows of x there are from the first one of a group on.
  __device__ __forceinline__ int left(int group) const { return tokens - group * kTokens; }

  // Block i of the weights and the norm into the ring; always closes a group, so that groups can be counted.
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

  // Block i of the rows g and g + 8 of a group; what tokens that are not there have is left out in the end.
  template <bool Aligned>
  __device__ __forceinline__ void load(int i, int group, Chunk<T> (&chunks)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * kTokens + g + 8 * half;
      const bool inside = i < own && row < tokens;
      chunks[half] = load_chunk<Aligned>(x.row(row), own_column<T>(i, warp, t), inside ? in.d_in : 0);
    }
  }

  // Block i of the weights times that of x, whose registers then take what comes kAhead blocks later.
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
  __device__ __forceinline__ void multiply(const float (&inverse)[GROUPS][2], Sums<T> (&sums)[TILES][GROUPS]) {
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
