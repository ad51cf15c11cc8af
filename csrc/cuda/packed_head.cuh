// The exit head with packed weights: as exit_head.cuh, a warp streams tiles of 16 vocabulary rows, here as the bytes of
// whole rows, one after the other through the ring of packed.cuh. Products are those of packed_tile.cuh.
//
// The ring is one size, 512 bytes a row: six of its eight stages are under way at least, 48 KB an SM.
#pragma once

#include "cuda/head_states.cuh"
#include "cuda/packed_tile.cuh"

namespace lsk {

// One warp's tiles first, first + step, ... on their way.
template <class W>
struct PackedTiles {
  using Reader = PackedReader<W, 2, 512>;
  using Ring = typename Reader::Ring;

  const PackedMatrix& matrix;
  const int64_t vocab_size, step;
  const int stages;  // of a tile
  Ring ring;
  Reader reader;
  int64_t tile;       // that is fetched
  int stage = 0;      // its next one
  int slot = 0;       // all stages that were asked for
  int start[2] = {};  // of the tile that is read, in the ring
  int base = 0;       // stages of the tiles that were read before it

  __device__ __forceinline__ PackedTiles(const PackedMatrix& weight, int64_t rows, int64_t first, int64_t step,
                                         typename Ring::Memory& memory)
      : matrix(weight),
        vocab_size(rows),
        step(step),
        stages(Ring::stages_of(weight.pitch)),
        ring(memory),
        reader(weight),
        tile(first) {}

  // Past the last row comes the last row again, whose logits are then left out.
  __device__ __forceinline__ const uint8_t* row(int64_t of, int r) const {
    return matrix.row(min(of * kHeadTile + threadIdx.x % 32 / 4 + 8 * r, vocab_size - 1));
  }

  // Asks for the next stage; past the last tile an empty group keeps the count.
  __device__ __forceinline__ void fetch() {
    if (stage == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        ring.aim(r, row(tile, r), tile * kHeadTile < vocab_size ? matrix.pitch : 0, matrix.end);
    }
    ring.fetch(stage, slot++);
    if (++stage == stages) stage = 0, tile += step;
  }

  __device__ __forceinline__ void begin(int64_t of) {
#pragma unroll
    for (int r = 0; r < 2; ++r) start[r] = base * Ring::kStage + Ring::skew(row(of, r));
    reader.at = 0;
  }

  // The next block of the tile. As PackedStream::step, it needs no stage but those kStages - 2 before the newest.
  __device__ __forceinline__ PackedPair next() {
    ptx::cp_async_wait<Ring::kStages - 2>();
    __syncwarp();
    PackedPair pairs[1];
    reader.read(ring, start, pairs);
    __syncwarp();  // all have read before it is overwritten
    if (slot < base + reader.at / Ring::kStage + Ring::kStages) fetch();
    return pairs[0];
  }

  __device__ __forceinline__ void end() {
    base += stages;
    fill();
  }

  __device__ __forceinline__ void fill() {
    while (slot < base + Ring::kStages) fetch();
  }
};

// Products of a tile with the states, `sums` as those of Products.
template <class T, class W, int GROUPS>
__device__ __forceinline__ void multiply_packed(PackedTiles<W>& tiles, const HeadArgs<T>& a, const T* states, int rows,
                                                float (&sums)[2 * GROUPS][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, blocks = a.head.hidden_size / kPackedColumns;
  PackedSums<T, W> own[GROUPS];
  for (int k = 0; k < blocks; ++k) {
    const PackedPair pair = tiles.next();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const int first = group * kTokens, left = rows - first;
      if (left <= 0) break;
      Chunk<T> x[kSubs<T>][2];
#pragma unroll
      for (int i = 0; i < 2 * kSubs<T>; ++i) {
        const int row = first + g + 8 * (i % 2), column = k * kPackedColumns + 8 * t + i / 2 * kChunk<T>;
        x[i / 2][i % 2] = load_chunk<true>(states + row * a.pitch, column, row < rows ? a.pitch : 0);
      }
      TokenSums of_x;
      if (std::is_same_v<W, Int4> && tiles.reader.less == 0) of_x = token_sums<T>(x, left);
      own[group].add(pair, tiles.reader.less, x, of_x, left);
    }
  }
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) own[group].row_sums(sums + 2 * group);
}

template <class T, class W, int GROUPS>
__global__ void __launch_bounds__(kThreads, 1) packed_head_kernel(HeadArgs<T> a, PackedMatrix weight) {
  __shared__ PassSampling<GROUPS> sampling;
  using Memory = typename PackedTiles<W>::Ring::Memory;
  ptx::dependents_trigger();
  unsigned char* memory = ptx::dynamic_shared();
  T* states = reinterpret_cast<T*>(memory + kWarps * sizeof(Memory));
  const int64_t first = static_cast<int64_t>(blockIdx.x % a.passes) * a.pass, teams = gridDim.x / a.passes;
  const int rows = static_cast<int>(min(a.rows - first, static_cast<int64_t>(a.pass))), warp = threadIdx.x / 32;
  const int64_t start = blockIdx.x / a.passes + teams * warp, step = teams * kWarps;
  PackedTiles<W> tiles(weight, a.head.vocab_size, start, step, reinterpret_cast<Memory*>(memory)[warp]);
  tiles.fill();
  prefetch_norm(a);
  ptx::dependency_wait();
  load_states(a, first, rows, states);
  load_sampling(a.sampling, first, rows, &sampling);
  __syncthreads();
  for (int64_t tile = start; tile < a.tiles; tile += step) {
    float sums[2 * GROUPS][4] = {};
    tiles.begin(tile);
    multiply_packed<T, W, GROUPS>(tiles, a, states, rows, sums);
    tiles.end();
    fold_tile(a, sums, tile, first, rows, sampling);
  }
}

template <class T, class W>
cudaError_t launch_packed_head(Chain& chain, HeadArgs<T> a, size_t available, int processors) {
  constexpr size_t kRings = kWarps * sizeof(typename PackedTiles<W>::Ring::Memory);
  if (reinterpret_cast<uintptr_t>(a.head.weight.data) % 16 != 0) return cudaErrorMisalignedAddress;
  a.pitch = static_cast<int>(a.head.hidden_size) + kPitchPadding<T>;
  const size_t states = plan_passes(a, available, kRings);
  if (states == 0) return cudaErrorInvalidConfiguration;
  const Launch where = chain.next(head_grid(a, processors), kThreads, kRings + states);
  return with_states<T>(a.pass, [&](auto groups) {
    return launch(where, packed_head_kernel<T, W, groups.value>, a, PackedMatrix(a.head.weight, a.head.vocab_size));
  });
}

}  // namespace lsk
