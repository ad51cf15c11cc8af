// The exit head with packed weights: as in exit_head.cu, a warp streams tiles of 16 vocabulary rows, here as bytes of
// whole rows, or of parts of them, through the ring of packed.cuh. Products are those of packed_tile.cuh.
//
// The ring has 512 bytes per row; at least six of its eight stages are in flight, 48 KB per SM.
#pragma once

#include "cuda/head_states.cuh"
#include "cuda/packed_tile.cuh"

namespace lsk {

// Products of one tile with the states, as HeadProducts.
template <class T, class W, int GROUPS>
struct PackedProducts {
  PackedSums<T, W> of[GROUPS];

  __device__ __forceinline__ void row_sums(float (*out)[4]) const {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) of[group].row_sums(out + 2 * group);
  }
};

// Stream of one warp over parts of its tiles: whole quantization groups of the rows.
template <class T, class W, int GROUPS, int TILES>
struct PackedTiles {
  using Products = PackedProducts<T, W, GROUPS>;
  using Reader = PackedReader<W, 2, 512>;
  using Ring = typename Reader::Ring;

  const HeadArgs<T>& a;
  const PackedMatrix& matrix;
  const int bytes, stages;  // bytes and stages of a part
  Ring ring;
  Reader reader;
  HeadWalk<TILES> at;  // tile and part to fetch next
  int stage = 0;       // next stage of that part
  int slot = 0;        // stages fetched so far
  int base = 0;        // stages of the parts read so far

  __device__ __forceinline__ PackedTiles(const HeadArgs<T>& args, const PackedMatrix& weight, const HeadWork& work,
                                         typename Ring::Memory* rings)
      : a(args),
        matrix(weight),
        bytes(
            min(args.width / kPackedColumns / weight.group_blocks * weight.group_bytes(W::kBlockBytes), weight.pitch)),
        stages(Ring::stages_of(bytes)),
        ring(rings[work.warp]),
        reader(weight),
        at{work.own(work.block), args.tiles, work.step, args.parts} {
    fill();
  }

  // A part of row g + 8 r of a tile. Past the end, the last row is loaded again and its logits are ignored.
  __device__ __forceinline__ const uint8_t* row(int64_t tile, int part, int r) const {
    const int64_t n = min(tile * kHeadTile + threadIdx.x % 32 / 4 + 8 * r, a.head.vocab_size - 1);
    return matrix.row(n) + static_cast<int64_t>(part) * bytes;
  }

  // Fetches the next stage; past the last tile an empty group keeps the count.
  __device__ __forceinline__ void fetch() {
    if (stage == 0) {
      const int left = at.tile < at.tiles ? min(bytes, matrix.pitch - at.part * bytes) : 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) ring.aim(r, row(at.tile, at.part, r), left, matrix.end);
    }
    ring.fetch(stage, slot++);
    if (++stage == stages) {
      stage = 0;
      at.next();
    }
  }

  __device__ __forceinline__ void fill() {
    while (slot < base + Ring::kStages) fetch();
  }

  // Reads the next block of the streams that begin at `start`. As in PackedStream::step, the two newest stages may be
  // in flight.
  __device__ __forceinline__ PackedPair next(const int (&start)[2]) {
    ptx::cp_async_wait<Ring::kStages - 2>();
    __syncwarp();
    PackedPair pairs[1];
    reader.read(ring, start, pairs);
    __syncwarp();  // all lanes have read before it is overwritten
    if (slot < base + reader.at / Ring::kStage + Ring::kStages) fetch();
    return pairs[0];
  }

  __device__ __forceinline__ void multiply(int64_t tile, int part, const HeadStates<T>& states, int rows,
                                           Products& products) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int start[2];  // offsets in the ring
#pragma unroll
    for (int r = 0; r < 2; ++r) start[r] = base * Ring::kStage + Ring::skew(row(tile, part, r));
    reader.at = 0;
    for (int k = 0; k < a.columns(part) / kPackedColumns; ++k) {
      const PackedPair pair = next(start);
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const int first = group * kTokens, left = rows - first;
        if (left <= 0) break;
        Chunk<T> x[kSubs<T>][2] = {};
#pragma unroll
        for (int i = 0; i < 2 * kSubs<T>; ++i) {
          const int state = first + g + 8 * (i % 2), piece = (k * kPackedColumns + 8 * t) / kChunk<T> + i / 2;
          if (state < rows) x[i / 2][i % 2] = *reinterpret_cast<const Chunk<T>*>(states.at(state, piece));
        }
        TokenSums of_x;
        if (std::is_same_v<W, Int4> && reader.less == 0) of_x = token_sums<T>(x, left);
        products.of[group].add(pair, reader.less, x, of_x, left);
      }
    }
    base += stages;
    fill();
  }
};

template <class T, class W, int GROUPS, int TILES>
__global__ void __launch_bounds__(kThreads, 1) packed_head_kernel(HeadArgs<T> a, PackedMatrix weight) {
  using Tiles = PackedTiles<T, W, GROUPS, TILES>;
  using Memory = typename Tiles::Ring::Memory;
  ptx::dependents_trigger();
  unsigned char* memory = ptx::dynamic_shared();
  const HeadWork work(a);
  Tiles tiles(a, weight, work, reinterpret_cast<Memory*>(memory));
  run_head<GROUPS, TILES>(a, work, reinterpret_cast<T*>(memory + kWarps * sizeof(Memory)), tiles);
}

template <class T, class W>
cudaError_t launch_packed_head(Chain& chain, HeadArgs<T> a, size_t available, int processors) {
  constexpr size_t kRings = kWarps * sizeof(typename PackedTiles<T, W, 1, 1>::Ring::Memory);
  constexpr int kUnit = 128;  // columns of the largest group
  if (reinterpret_cast<uintptr_t>(a.head.weight.data) % 16 != 0) return cudaErrorMisalignedAddress;
  const size_t states = plan_passes(a, kUnit, available, kRings);
  const Launch where = chain.next(head_grid(a, processors), kThreads, kRings + states);
  return with_states(a, [&](auto groups, auto tiles) {
    return launch(where, packed_head_kernel<T, W, groups.value, tiles.value>, a,
                  PackedMatrix(a.head.weight, a.head.vocab_size));
  });
}

}  // namespace lsk
