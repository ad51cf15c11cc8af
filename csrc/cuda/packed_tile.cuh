// As linear_tile.cuh, for packed weights: the warps of a block share the depth in units of quantization groups.
//
// Products use the unscaled integers, which T represents exactly; the sums of a block are multiplied by the scale in
// fp32, so no weight is rounded. The minimum of a group, if it has one, is multiplied by the sum of x over the block,
// which an mma with ones computes.
//
// A warp takes neighbouring groups, so that its part of a row is one stream. Lanes copy 16-byte chunks as for plain
// weights, but read chunks copied by other lanes. The order of a row's sums depends on the width and the group size
// alone.
#pragma once

#include "cuda/linear_tile.cuh"
#include "cuda/packed.cuh"

namespace lsk {

// Chunks of x per lane and block of columns.
template <class T>
constexpr int kSubs = kPackedColumns / kQuadColumns<T>;

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

// As Sums, for packed weights. `sums` are the sums of x, if groups have a minimum.
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

  // Sums in the layout of the exit head: rows g (i < 2) and g + 8 with tokens 8 n + 2 t + i % 2.
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

// Reads the streams of `kRows` rows per lane; shared by the layers and the exit head.
template <class W, int kRows, int kBytes>
struct PackedReader {
  using Ring = PackedRing<kRows, kBytes>;

  const int group_blocks, header, less;
  Factors factors[kRows];
  int at = 0, phase = 0;  // bytes read of a stream; blocks read of the group

  __device__ __forceinline__ explicit PackedReader(const PackedMatrix& matrix)
      : group_blocks(matrix.group_blocks), header(matrix.header), less(matrix.less()) {}

  // Reads the next block of the streams, which begin at `start` in the ring.
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

constexpr int kTileRing = 512;  // bytes of a ring per lane row and tile

template <int TILES, int GROUPS>
struct PackedMemory : StreamMemory<typename PackedRing<2 * TILES, kTileRing / TILES>::Memory, TILES, GROUPS> {
  float scratch[GROUPS][kWarps * kTokens];
};

// As TileStream; x and the norm must be aligned.
template <class T, class W, int TILES, int GROUPS>
struct PackedStream
    : StreamBase<PackedStream<T, W, TILES, GROUPS>, T, PackedSums<T, W>, PackedMemory<TILES, GROUPS>, TILES, GROUPS> {
  using Memory = PackedMemory<TILES, GROUPS>;
  using Base = StreamBase<PackedStream, T, PackedSums<T, W>, Memory, TILES, GROUPS>;
  using Base::in, Base::memory, Base::x, Base::tokens, Base::lane, Base::warp, Base::g, Base::t, Base::left;
  static constexpr bool kAligned = true;
  static constexpr int kRows = 2 * TILES, kAhead = TILES * GROUPS >= 4 ? 1 : 2;
  using Matrix = PackedMatrix;
  using Reader = PackedReader<W, kRows, kTileRing / TILES>;
  using Ring = typename Reader::Ring;

  // x and norm of a block of columns.
  struct Columns {
    Chunk<T> x[GROUPS][kSubs<T>][2], norm[kSubs<T>];
  };

  Reader reader;
  int first, count;  // blocks of columns of this warp
  Ring ring;
  int start[kRows];  // start of the streams in the ring

  // All matrices must have the layout of `matrix`.
  __device__ __forceinline__ PackedStream(const Input<T>& input, const Matrix& matrix, int64_t row, int rows,
                                          Memory& shared)
      : Base(input, row, rows, shared), reader(matrix), ring(shared.warps[warp].ring) {
    const int groups = in.d_in / (matrix.group_blocks * kPackedColumns);
    first = groups * warp / kWarps * matrix.group_blocks;
    count = groups * (warp + 1) / kWarps * matrix.group_blocks - first;
  }

  // Makes row n of a matrix this lane's row r.
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

 private:
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

  // Multiplies block i of the weights and of x, then loads x of block i + kAhead into the same registers. A block has
  // up to 36 bytes, so a step needs at most one more stage of the ring, and that is complete: only the two newest may
  // be in flight.
  __device__ __forceinline__ void step(int i, Columns& columns, const float (&inverse)[GROUPS][2],
                                       PackedSums<T, W> (&sums)[TILES][GROUPS]) {
    ptx::cp_async_wait<Ring::kStages - 2>();
    __syncwarp();  // makes copies of other lanes visible
    const int before = reader.at / Ring::kStage;
    PackedPair pairs[TILES];
    reader.read(ring, start, pairs);
    __syncwarp();  // all lanes have read before it is overwritten
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
};

// The stream for weights W (T if plain) and GROUPS groups of 16 rows of x.
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

// A matrix of weights W as a kernel argument.
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

// Calls f with a null pointer of type T, Int8, Int4 or Fp8, depending on the format.
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

// Calls f(null pointer of W, std::integral_constant<int, GROUPS>()) for this format and number of rows.
template <class T, class F>
cudaError_t with_stream(Format format, int64_t rows, F f) {
  return with_weight<T>(format, [&]<class W>(W* weight) {
    return with_groups<T, W>(rows, [&](auto groups) { return f(weight, groups); });
  });
}

// As input() of linear_tile.cuh, with the alignment of the weights, in any format.
template <class T>
Input<T> input(Rows<const T> x, const T* norm, float eps, int64_t rows, int64_t d_in,
               std::initializer_list<Weight> weights) {
  Input<T> out = input<T>(x, norm, eps, rows, d_in);
  for (const Weight& weight : weights)
    out.aligned = out.aligned && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0 &&
                  (weight.format != Format::kPlain || weight.pitch % 16 == 0);
  return out;
}

// Rejects weights of different formats in one launch, and packed weights that are not aligned.
template <class T>
cudaError_t check_weights(const Input<T>& in, std::initializer_list<Weight> weights) {
  const Format format = weights.begin()->format;
  for (const Weight& weight : weights)
    if (weight.format != format) return cudaErrorInvalidValue;
  return format == Format::kPlain || in.aligned ? cudaSuccess : cudaErrorMisalignedAddress;
}

}  // namespace lsk
