// The exit head: norm, head matmul, arg-max or sampling, and log-sum-exp of up to 64 states (16 in fp32) in one pass
// over the weights, without logits in memory. A second, small kernel merges the results of the vocabulary tiles.
//
// A warp takes tiles of 16 vocabulary rows and streams each through its own ring in shared memory, in segments of 256
// bytes per row, so that no warp waits for another. Weights are the A operand of mma.m16n8k16; states are the B
// operand, resident in shared memory: 8 states cost as much as one. The columns of an mma may be permuted as long as A
// and B agree: they are the 16 bytes that a thread reads at once, so a fragment is one conflict-free read. fp32 has no
// tensor-core product of its precision, and uses the same 16 bytes with fused multiply-adds.
//
// States that do not fit beside the rings are loaded in parts of their columns. A warp then multiplies four tiles with
// each part and keeps their products in registers, so that a block reads its states once per 512 vocabulary rows: at
// most an eighth of the bytes of these rows, whereas several passes would read all of them from L2 again.
//
// Determinism: a state's products, its tiles and the order of merging depend on D and V alone, neither on the number of
// states nor on the grid.
//
// Bytes in flight: an H100 has 3.35 TB/s and about 0.8 us latency, so 2.7 MB must be in flight, 20 KB per SM. 8 warps
// with 3 of their 4 stages of 4 KB in flight are 96 KB: enough while some warps reduce a tile, and at the uneven end
// (the 8016 tiles of V = 128256 are 60 or 61 per SM of 132: 0.5 % imbalance). The first stages are fetched before the
// dependency wait, and the norm is computed while they arrive.
#include "cuda/packed_head.cuh"

namespace lsk {

__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }

// 16 bytes, aligned, as four words.
__device__ __forceinline__ void read_words(const void* from, uint32_t* words) {
  const uint4 v = *static_cast<const uint4*>(from);
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

// 16 aligned bytes of W as floats.
template <class W>
__device__ __forceinline__ void read_floats(const void* from, float (&out)[16 / sizeof(W)]) {
  constexpr int kCount = 16 / sizeof(W);
  uint32_t words[4];
  read_words(from, words);
  W values[kCount];
  memcpy(values, words, 16);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_float(values[i]);
}

// 16 aligned bytes of W as pairs of 16-bit T, which hold every int8 exactly.
template <class T, class W>
__device__ __forceinline__ void read_pairs(const void* from, uint32_t (&out)[8 / sizeof(W)]) {
  if constexpr (std::is_same_v<T, W>) {
    read_words(from, out);
  } else {
    float wide[16 / sizeof(W)];
    read_floats<W>(from, wide);
#pragma unroll
    for (int i = 0; i < 8 / static_cast<int>(sizeof(W)); ++i) out[i] = to_pair<T>(wide[2 * i], wide[2 * i + 1]);
  }
}

constexpr int kSegmentBytes = 256;  // bytes of a weight row per stage
constexpr int kPieces = kSegmentBytes / 16;
constexpr int kStageBytes = kHeadTile * kSegmentBytes;
constexpr int kMinStages = 2, kMaxStages = 4;

// Byte offset of a piece of a row in a stage.
__device__ __forceinline__ int place(int row, int piece) { return row * kSegmentBytes + swizzled(row, piece) * 16; }

// Products of one tile with the states. Lane 4 g + t of a warp reads piece 4 h + t of every group h of weight rows g
// and g + 8. row_sums writes to out[n] the sums of these rows with states 8 n + 2 t and 8 n + 2 t + 1, in the layout of
// mma.
template <class T, class W, int GROUPS>
struct HeadProducts {
  float sums[2 * GROUPS][4] = {};

  __device__ __forceinline__ void add(const unsigned char* stage, const HeadStates<T>& states, int rows) {
    constexpr int kPairs = 8 / sizeof(W);  // pairs of columns in 16 bytes
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < kPieces / 4; ++h) {
      uint32_t low[kPairs], high[kPairs];
      read_pairs<T, W>(stage + place(g, 4 * h + t), low);
      read_pairs<T, W>(stage + place(g + 8, 4 * h + t), high);
#pragma unroll
      for (int n = 0; n < 2 * GROUPS; ++n) {
        if (8 * n >= rows) break;
        uint32_t x[kPairs] = {};
        if (8 * n + g < rows) {
#pragma unroll
          for (int i = 0; i < kPairs; i += 4) read_words(states.at(8 * n + g, ((4 * h + t) * kPairs + i) / 4), x + i);
        }
#pragma unroll
        for (int i = 0; i < kPairs; i += 2)
          ptx::mma<T>(sums[n], {low[i], high[i], low[i + 1], high[i + 1]}, {x[i], x[i + 1]});
      }
    }
  }

  __device__ __forceinline__ void row_sums(float (*out)[4]) const { memcpy(out, sums, sizeof sums); }
};

template <class W>
struct HeadProducts<float, W, 1> {
  float own[kTokens][2] = {};  // sums over this lane's columns of every state with rows g and g + 8

  __device__ __forceinline__ void add(const unsigned char* stage, const HeadStates<float>& states, int rows) {
    constexpr int kPiece = 16 / sizeof(W);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < kPieces / 4; ++h) {
      float low[kPiece], high[kPiece];
      read_floats<W>(stage + place(g, 4 * h + t), low);
      read_floats<W>(stage + place(g + 8, 4 * h + t), high);
#pragma unroll
      for (int r = 0; r < kTokens; ++r) {
        if (r >= rows) break;
#pragma unroll
        for (int i = 0; i < kPiece; i += 4) {
          float x[4];
          read_floats<float>(states.at(r, ((4 * h + t) * kPiece + i) / 4), x);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            own[r][0] = __fmaf_rn(low[i + k], x[k], own[r][0]);
            own[r][1] = __fmaf_rn(high[i + k], x[k], own[r][1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void row_sums(float (*out)[4]) const {
#pragma unroll
    for (int r = 0; r < kTokens; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(own[r][half]);
        if (threadIdx.x % 4 == r % 8 / 2) out[r / 8][2 * half + r % 2] = sum;
      }
    }
  }
};

// Streams one warp's weights through its ring, segment by segment, and multiplies them.
template <class T, class W, int GROUPS, int TILES>
struct WeightStream {
  using Products = HeadProducts<T, W, GROUPS>;
  static constexpr int kElements = kSegmentBytes / sizeof(W);

  const HeadArgs<T>& a;
  unsigned char* memory;
  HeadWalk<TILES> at;  // tile and part to fetch next
  int column = 0;      // column in the part
  int in = 0, out = 0;

  __device__ __forceinline__ WeightStream(const HeadArgs<T>& args, const HeadWork& work, unsigned char* rings)
      : a(args),
        memory(rings + work.warp * args.stages * kStageBytes),
        at{work.own(work.block), args.tiles, work.step, args.parts} {
    for (int i = 1; i < a.stages; ++i) fetch();
  }

  // Fetches the next segment; past the last one an empty group keeps the count.
  __device__ __forceinline__ void fetch() {
    if (at.tile < at.tiles) {
      const W* weight = reinterpret_cast<const W*>(a.head.weight.data);
      unsigned char* stage = memory + in * kStageBytes;
#pragma unroll
      for (int j = 0; j < kHeadTile * kPieces / 32; ++j) {
        const int lane = threadIdx.x % 32, row = 2 * j + lane / kPieces, piece = lane % kPieces;
        // Past the end, the last row is loaded again and its logits are ignored.
        const int64_t source = min(at.tile * kHeadTile + row, a.head.vocab_size - 1);
        copy_chunk(reinterpret_cast<Chunk<W>*>(stage + place(row, piece)), weight + source * a.head.hidden_size,
                   at.part * a.width + column + piece * kChunk<W>, static_cast<int>(a.head.hidden_size),
                   a.weight_aligned);
      }
      column += kElements;
      if (column >= a.columns(at.part)) {
        column = 0;
        at.next();
      }
    }
    ptx::cp_async_commit();
    in = in + 1 == a.stages ? 0 : in + 1;
  }

  // Returns the oldest segment, complete for the whole warp; the stage read before it is free again.
  __device__ __forceinline__ const unsigned char* next() {
    static_assert(kMinStages == 2 && kMaxStages == 4);
    if (a.stages == 4) {
      ptx::cp_async_wait<2>();
    } else if (a.stages == 3) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncwarp();
    const unsigned char* stage = memory + out * kStageBytes;
    out = out + 1 == a.stages ? 0 : out + 1;
    return stage;
  }

  __device__ __forceinline__ void multiply(int64_t, int part, const HeadStates<T>& states, int rows,
                                           Products& products) {
    for (int begin = 0; begin < a.columns(part); begin += kElements) {
      const unsigned char* stage = next();
      fetch();
      products.add(stage, {states.data + begin, states.width}, rows);
    }
  }
};

template <class T, class W, int GROUPS, int TILES>
__global__ void __launch_bounds__(kThreads, 1) exit_head_kernel(HeadArgs<T> a) {
  ptx::dependents_trigger();
  unsigned char* memory = ptx::dynamic_shared();
  const HeadWork work(a);
  WeightStream<T, W, GROUPS, TILES> stream(a, work, memory);
  run_head<GROUPS, TILES>(a, work, reinterpret_cast<T*>(memory + kWarps * a.stages * kStageBytes), stream);
}

// One block per row.
template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    exit_head_merge_kernel(const ArgmaxLse* partial, int64_t tiles, const int64_t* token_map, int64_t* token,
                           float* logit, float* logsumexp) {
  __shared__ ArgmaxLse shared[kMaxThreads / 32];
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t row = blockIdx.x;
  const ArgmaxLse best = block_merge(merge_strided(partial + row * tiles, tiles), shared);
  if (threadIdx.x != 0) return;
  const float total = log_sum_exp(best);
  token[row] = chosen_token(best, token_map);
  logit[row] = total == total ? best.value : total;
  logsumexp[row] = total;
}

// Launches the tiles with weights W: T, or int8 rows.
template <class T, class W>
cudaError_t launch_head(Chain& chain, HeadArgs<T> a, size_t available, int processors) {
  constexpr size_t kStage = kWarps * kStageBytes;
  a.weight_aligned = reinterpret_cast<uintptr_t>(a.head.weight.data) % 16 == 0 && a.head.weight.pitch % 16 == 0;
  const size_t states = plan_passes(a, kSegmentBytes / sizeof(W), available, kMinStages * kStage);
  const size_t deep = (available - states) / kStage;  // the deepest ring that fits beside them
  a.stages = deep < kMaxStages ? static_cast<int>(deep) : kMaxStages;
  const Launch where = chain.next(head_grid(a, processors), kThreads, a.stages * kStage + states);
  return with_states(
      a, [&](auto groups, auto tiles) { return launch(where, exit_head_kernel<T, W, groups.value, tiles.value>, a); });
}

template <class T>
cudaError_t exit_head_tiles(Chain& chain, const Head<T>& head, Rows<const T> hidden, int64_t rows,
                            const HeadSampling& sampling, HeadLogits logits, ArgmaxLse* partial) {
  if (rows == 0) return cudaSuccess;
  constexpr int kOwn = 2048;  // upper bound of the kernels' static shared memory
  int device = 0, available = 0, processors = 0;
  LSK_RETURN_IF_ERROR(cudaGetDevice(&device));
  LSK_RETURN_IF_ERROR(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LSK_RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  HeadArgs<T> a{head, hidden, rows, sampling, logits, partial, head_tiles(head.vocab_size)};
  a.states_aligned = hidden.aligned() && is_aligned(head.norm_weight, head.hidden_size);
  const size_t room = static_cast<size_t>(available - kOwn);
  if (head.weight.format == Format::kRows) return launch_head<T, int8_t>(chain, a, room, processors);
  return with_weight<T>(head.weight.format, [&]<class W>(W*) {
    if constexpr (std::is_same_v<W, T>) {
      return launch_head<T, T>(chain, a, room, processors);
    } else {
      return launch_packed_head<T, W>(chain, a, room, processors);
    }
  });
}

cudaError_t exit_head_merge(Chain& chain, const ArgmaxLse* partial, int64_t rows, int64_t vocab_size,
                            const int64_t* token_map, int64_t* token, float* logit, float* logsumexp) {
  const int64_t tiles = head_tiles(vocab_size);
  return launch(chain.next(dim3(static_cast<unsigned>(rows)), merge_threads(tiles)),
                exit_head_merge_kernel<kMaxMergeThreads>, partial, tiles, token_map, token, logit, logsumexp);
}

#define LSK_INSTANTIATE(T)                                                                                  \
  template cudaError_t exit_head_tiles(Chain&, const Head<T>&, Rows<const T>, int64_t, const HeadSampling&, \
                                       HeadLogits, ArgmaxLse*);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
