// As linear_tile.cuh, of packed weights: a tile of 16 rows by one block, whose warps share the depth by groups.
//
// Products are of the integers as they are, which T holds exactly, and a block's sums are multiplied by the scale in
// fp32: no weight is rounded. The least value of a group, where it has one, is multiplied by the sum of x over the
// block, which a product with ones gives.
//
// A warp takes neighbouring groups, so that its part of a row is one stream; lanes copy 16-byte chunks as they do of
// plain weights, but read what others have copied. The order of a row's sums follows from the width and the size of the
// groups alone.
#pragma once

#include "cuda/linear_tile.cuh"
#include "cuda/packed.cuh"

namespace lsk {

// Chunks of x that a lane takes of a block of columns.
template <class T>
constexpr int kSubs = kPackedColumns / kBlock<T>;

// A lane's columns of a block of two weight rows, g and g + 8.
struct PackedPair {
  uint32_t low[2], high[2];
  Factors of_low, of_high;
};

// Sums of x over a block of columns, of tokens 2 t and 2 t + 1 (+ 8).
struct TokenSums {
  float of[2][2] = {};
};

template <class T>
__device__ __forceinline__ TokenSums token_sums(const Chunk<T> (&x)[kSubs<T>][2], int tokens) {
  TokenSums sums;
  if constexpr (sizeof(T) == 2) {
    constexpr uint32_t kOnes = std::is_same_v<T, __nv_bfloat16> ? 0x3f803f80 : 0x3c003c00;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && tokens <= 8) break;
      uint32_t b[2][2];
      memcpy(b, &x[0][half], 16);
      float d[4] = {};
      ptx::mma<T>(d, ones, b[0]);
      ptx::mma<T>(d, ones, b[1]);
      sums.of[half][0] = d[0], sums.of[half][1] = d[1];
    }
  }
  return sums;
}

// Sums as those of plain weights. `sums` are those of x where there are least values.
template <class T, class W>
struct PackedSums : Sums<T> {
  __device__ __forceinline__ void add(const PackedPair& pair, int less, const Chunk<T> (&x)[kSubs<T>][2],
                                      const TokenSums& sums, int tokens) {
    uint32_t a[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t low[2], high[2];
      widen<T, W>(pair.low[k], less, low), widen<T, W>(pair.high[k], less, high);
      a[k][0] = low[0], a[k][1] = high[0], a[k][2] = low[1], a[k][3] = high[1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && tokens <= 8) break;
      uint32_t b[2][2];
      memcpy(b, &x[0][half], 16);
      float d[4] = {};
      ptx::mma<T>(d, a[0], b[0]);
      ptx::mma<T>(d, a[1], b[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Factors& of = i < 2 ? pair.of_low : pair.of_high;
        float& sum = this->d[half][i];
        sum = __fmaf_rn(d[i], of.scale, sum);
        if constexpr (std::is_same_v<W, Int4>)
          if (less == 0) sum = __fmaf_rn(sums.of[half][i % 2], of.least, sum);
      }
    }
  }

  // As the exit head wants them: of rows g (i < 2) and g + 8 with tokens 8 n + 2 t + i % 2.
  __device__ __forceinline__ void row_sums(float (*out)[4]) const { memcpy(out, this->d, sizeof this->d); }
};

template <class W>
struct PackedSums<float, W> : Sums<float> {
  __device__ __forceinline__ void add(const PackedPair& pair, int less, const Chunk<float> (&x)[kSubs<float>][2],
                                      const TokenSums&, int tokens) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Chunk<float> low, high;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low.words[i] = __float_as_uint(weight_at<W>(pair.low[k], i, less, pair.of_low));
        high.words[i] = __float_as_uint(weight_at<W>(pair.high[k], i, less, pair.of_high));
      }
      Sums<float>::add(low, high, x[k], tokens);
    }
  }

  __device__ __forceinline__ void row_sums(float (*out)[4]) const {
#pragma unroll
    for (int i = 0; i < 2 * kTokens; ++i) {
      const int half = i % 2, token = i / 2;
      const float sum = quad_sum(d[half][token]);
      if (threadIdx.x % 4 == token % 8 / 2) out[token / 8][2 * half + token % 2] = sum;
    }
  }
};

// Streams of `kRows` rows a lane, and where they are: shared by the products of layers and of the head.
template <class W, int kRows, int kBytes>
struct PackedReader {
  using Ring = PackedRing<kRows, kBytes>;

  const int group_blocks, header, less;
  Factors factors[kRows];
  int at = 0, phase = 0;  // bytes of a stream that were read; blocks of the group

  __device__ __forceinline__ explicit PackedReader(const PackedMatrix& matrix)
      : group_blocks(matrix.group_blocks), header(matrix.header), less(matrix.less()) {}

  // The next block of the streams, which begin at `start` in the ring.
  __device__ __forceinline__ void read(const Ring& ring, const int (&start)[kRows], PackedPair (&pairs)[kRows / 2]) {
    const int t = threadIdx.x % 4;
    if (phase == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) factors[r] = factors_of<W>(ring.four(r, start[r] + at), less == 0);
      at += header;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t (&values)[2] = r % 2 == 0 ? pairs[r / 2].low : pairs[r / 2].high;
      ring.eight(r, start[r] + at + lane_place<W>(t), values);
      values[0] = lane_values<W>(values[0], t), values[1] = lane_values<W>(values[1], t);
      (r % 2 == 0 ? pairs[r / 2].of_low : pairs[r / 2].of_high) = factors[r];
    }
    at += W::kBlockBytes;
    phase = phase + 1 == group_blocks ? 0 : phase + 1;
  }
};

// Shared memory of a block that streams TILES tiles at once.
template <int TILES, int GROUPS>
struct PackedMemory {
  static constexpr int kRing = 512 / TILES, kPitch = 20;
  union Warp {
    alignas(16) typename PackedRing<2 * TILES, kRing>::Memory ring;
    float sums[TILES][GROUPS * kTokens * kPitch];
  };
  Warp warps[kWarps];
  float scratch[GROUPS][kWarps * kTokens];

  // As TileMemory::total.
  __device__ __forceinline__ float total(int tile, int row, int token) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warps[w].sums[tile][token * kPitch + row];
    return sum;
  }
};

// As TileStream; x and the norm must be aligned.
template <class T, class W, int TILES, int GROUPS>
struct PackedStream {
  static constexpr int kRows = 2 * TILES, kAhead = TILES * GROUPS >= 4 ? 1 : 2;
  using Memory = PackedMemory<TILES, GROUPS>;
  using Matrix = PackedMatrix;
  using Reader = PackedReader<W, kRows, Memory::kRing>;
  using Ring = typename Reader::Ring;

  // What a block of columns takes of x, and of the norm.
  struct Columns {
    Chunk<T> x[GROUPS][kSubs<T>][2], norm[kSubs<T>];
  };

  const Input<T>& in;
  Memory& memory;
  const Rows<const T> x;  // from the block's first row on
  const int tokens, lane, warp, g, t;
  Reader reader;
  int first, count;  // blocks of columns of this warp
  Ring ring;
  int start[kRows];  // of the streams in the ring

  // All matrices have the layout of `matrix`.
  __device__ __forceinline__ PackedStream(const Input<T>& input, const Matrix& matrix, int64_t row, int rows,
                                          Memory& shared)
      : in(input),
        memory(shared),
        x{input.x.row(row), input.x.pitch},
        tokens(rows),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(lane / 4),
        t(lane % 4),
        reader(matrix),
        ring(shared.warps[warp].ring) {
    const int groups = in.d_in / (matrix.group_blocks * kPackedColumns);
    first = groups * warp / kWarps * matrix.group_blocks;
    count = groups * (warp + 1) / kWarps * matrix.group_blocks - first;
  }

  // Row n of a matrix is this lane's row r.
  __device__ __forceinline__ void take(int r, const Matrix& matrix, int n) {
    const int each = matrix.group_bytes(W::kBlockBytes), groups = matrix.group_blocks;
    const uint8_t* from = matrix.row(n) + static_cast<int64_t>(first / groups) * each;
    start[r] = Ring::skew(from);
    ring.aim(r, from, count / groups * each, matrix.end);
  }

  __device__ __forceinline__ void prefetch() {
#pragma unroll 1
    for (int i = 0; i < Ring::kStages; ++i) ring.fetch(i, i);
    constexpr int kLine = 128 / sizeof(T);
    if (in.norm == nullptr) return;
    for (int column = lane * kLine; column < count * kPackedColumns; column += 32 * kLine)
      ptx::prefetch_l2(in.norm + first * kPackedColumns + column);
  }

  // Ends with a __syncthreads().
  __device__ __forceinline__ void run() {
    float inverse[GROUPS][2];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      if (!in.norm || left(group) <= 0) break;
      const Rows<const T> rows{x.row(group * kTokens), x.pitch};
      inverse_rms(rows, left(group), in.d_in, in.eps, true, memory.scratch[group], inverse[group]);
    }
    PackedSums<T, W> sums[TILES][GROUPS];
    multiply(inverse, sums);
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
  // As TileStream::left.
  __device__ __forceinline__ int left(int group) const { return tokens - group * kTokens; }

  // This lane's columns of block i.
  __device__ __forceinline__ int column(int i, int sub) const {
    return (first + i) * kPackedColumns + 8 * t + sub * kChunk<T>;
  }

  __device__ __forceinline__ void load(int i, int group, Columns& columns) const {
#pragma unroll
    for (int n = 0; n < 2 * kSubs<T>; ++n) {
      const int row = group * kTokens + g + 8 * (n % 2);
      const bool inside = i < count && row < tokens;
      columns.x[group][n / 2][n % 2] = load_chunk<true>(x.row(row), column(i, n / 2), inside ? in.d_in : 0);
    }
  }

  __device__ __forceinline__ void load_norm(int i, Columns& columns) const {
    if (!in.norm) return;
#pragma unroll
    for (int sub = 0; sub < kSubs<T>; ++sub)
      columns.norm[sub] = load_chunk<true>(in.norm, column(i, sub), i < count ? in.d_in : 0);
  }

  // Block i of the weights times that of x, whose registers then take what comes kAhead blocks later.
  //
  // A block has 36 bytes at most, so a step needs one more stage of the ring at most, which is then the second newest
  // but kStages - 2 or older.
  __device__ __forceinline__ void step(int i, Columns& columns, const float (&inverse)[GROUPS][2],
                                       PackedSums<T, W> (&sums)[TILES][GROUPS]) {
    ptx::cp_async_wait<Ring::kStages - 2>();
    __syncwarp();  // what other lanes have copied, too
    const int before = reader.at / Ring::kStage;
    PackedPair pairs[TILES];
    reader.read(ring, start, pairs);
    __syncwarp();  // all have read before it is overwritten
    if (const int after = reader.at / Ring::kStage; after > before)
      ring.fetch(after + Ring::kStages - 1, after + Ring::kStages - 1);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      if (group > 0 && left(group) <= 0) break;
      auto& own = columns.x[group];
#pragma unroll
      for (int n = 0; n < 2 * kSubs<T>; ++n)
        if (in.norm && 8 * (n % 2) < left(group))
          own[n / 2][n % 2] = normed(own[n / 2][n % 2], inverse[group][n % 2], columns.norm[n / 2]);
      TokenSums of_x;
      if (std::is_same_v<W, Int4> && reader.less == 0) of_x = token_sums<T>(own, left(group));
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) sums[tile][group].add(pairs[tile], reader.less, own, of_x, left(group));
      load(i + kAhead, group, columns);
    }
    load_norm(i + kAhead, columns);
  }

  __device__ __forceinline__ void multiply(const float (&inverse)[GROUPS][2], PackedSums<T, W> (&sums)[TILES][GROUPS]) {
    Columns ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) load(i, group, ahead[i]);
      load_norm(i, ahead[i]);
    }
    for (int begin = 0; begin < count; begin += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i >= count) break;
        step(begin + i, ahead[i], inverse, sums);
      }
    }
  }
};

// The stream of weights W, T for plain ones, past GROUPS groups of 16 rows of x.
template <class T, class W, int TILES, int GROUPS>
struct StreamOf {
  using type = PackedStream<T, W, TILES, GROUPS>;
};
template <class T, int TILES, int GROUPS>
struct StreamOf<T, T, TILES, GROUPS> {
  using type = TileStream<T, TILES, GROUPS>;
};
template <class T, class W, int TILES, int GROUPS>
using Stream = typename StreamOf<T, W, TILES, GROUPS>::type;

// A matrix of weights W as kernels take it.
template <class T, class W>
using MatrixOf = typename Stream<T, W, 1, 1>::Matrix;

template <class T, class W>
MatrixOf<T, W> matrix_of(const Weight& weight, int64_t rows) {
  if constexpr (std::is_same_v<T, W>) {
    return reinterpret_cast<const T*>(weight.data);
  } else {
    return PackedMatrix(weight, rows);
  }
}

// Calls f with a null pointer of the W that the weights have: T, Int8, Int4 or Fp8.
template <class T, class F>
cudaError_t with_weight(Format format, F f) {
  switch (format) {
    case Format::kPlain:
      return f(static_cast<T*>(nullptr));
    case Format::kInt8:
    case Format::kInt8Of128:
      return f(static_cast<Int8*>(nullptr));
    case Format::kFp8:
    case Format::kFp8Of128:
      return f(static_cast<Fp8*>(nullptr));
    default:
      return f(static_cast<Int4*>(nullptr));
  }
}

// Calls f(null pointer of W, std::integral_constant<int, GROUPS>()) for the stream of such weights past so many rows.
template <class T, class F>
cudaError_t with_stream(Format format, int64_t rows, F f) {
  return with_weight<T>(format, [&]<class W>(W* weight) {
    return with_groups<T, W>(rows, [&](auto groups) { return f(weight, groups); });
  });
}

// As input() of linear_tile.cuh, with all weights that go with it, in any format.
template <class T>
Input<T> input(Rows<const T> x, const T* norm, float eps, int64_t rows, int64_t d_in,
               std::initializer_list<Weight> weights) {
  Input<T> out = input<T>(x, norm, eps, rows, d_in);
  for (const Weight& weight : weights)
    out.aligned = out.aligned && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0 &&
                  (weight.format != Format::kPlain || weight.pitch % 16 == 0);
  return out;
}

// What the streams cannot do: weights of one product in two formats, or packed ones that are not aligned.
template <class T>
cudaError_t check_weights(const Input<T>& in, std::initializer_list<Weight> weights) {
  const Format format = weights.begin()->format;
  for (const Weight& weight : weights)
    if (weight.format != format) return cudaErrorInvalidValue;
  return format == Format::kPlain || in.aligned ? cudaSuccess : cudaErrorMisalignedAddress;
}

}  // namespace lsk
