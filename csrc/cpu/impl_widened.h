// Dot products with more than two activation rows, for AVX2's sixteen registers of eight floats.

// Converts weights to fp32 once for all activation rows, four weight rows at a time. An F16 sum takes two registers
// that do not depend on each other: the low halves are computed first, then the high ones, so that the sums of three
// activation rows and their operands fit the registers. Each lane adds the same terms in the same order as in dot_quad,
// so the bits are equal.

constexpr int64_t kColumnsAtOnce = 1024;  // columns; four rows of them in fp32 fill half of an L1 cache
constexpr int kWideRows = 3;

// Adds x[m] * w[i] over some columns to half of the sums; the sums are [m][i][16].
template <int MR>
inline void add_half(const float* w, const float* x, int64_t stride, int64_t columns, float* sums) {
  __m256 sum[MR][kQuad];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < kQuad; ++i) sum[m][i] = _mm256_loadu_ps(sums + (m * kQuad + i) * 16);
  for (int64_t k = 0; k < columns; k += 16) {
    __m256 lanes[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) lanes[m] = _mm256_loadu_ps(x + m * stride + k);
#pragma GCC unroll 4
    for (int i = 0; i < kQuad; ++i) {
      const __m256 weights = _mm256_loadu_ps(w + i * kColumnsAtOnce + k);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[m][i] = _mm256_fmadd_ps(weights, lanes[m], sum[m][i]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < kQuad; ++i) _mm256_storeu_ps(sums + (m * kQuad + i) * 16, sum[m][i]);
}

inline void add_piece(const float* w, const float* x, int64_t stride, int64_t rows, int64_t columns, float* sums) {
  for (int64_t m = 0; m < rows; m += kWideRows)
    for (int half = 0; half < 16; half += 8) {
      const float* lanes = x + m * stride + half;
      float* own = sums + m * kQuad * 16 + half;
      if (rows - m == 1)
        add_half<1>(w + half, lanes, stride, columns, own);
      else if (rows - m == 2)
        add_half<2>(w + half, lanes, stride, columns, own);
      else
        add_half<3>(w + half, lanes, stride, columns, own);
    }
}

// As dot_quad, for up to kMaxRows activation rows.
template <class W>
inline void dot_widened(const W* const rows[kQuad], const float* x, int64_t stride, int64_t count, int64_t width,
                        const char* lines, float* out) {
  constexpr int64_t kLine = 64 / sizeof(W);
  alignas(64) float w[kQuad * kColumnsAtOnce], sums[kMaxRows * kQuad * 16];
  for (int64_t i = 0; i < count * kQuad * 16; i += 16) store(sums + i, splat(0));
  for (int64_t begin = 0; begin < width; begin += kColumnsAtOnce) {
    const int64_t columns = width - begin < kColumnsAtOnce ? width - begin : kColumnsAtOnce;
    for (int64_t k = 0; k < columns; k += 16)
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) {
        const W* from = rows[i] + begin + k;
        store(w + i * kColumnsAtOnce + k, columns - k < 16 ? load(from, columns - k) : load(from));
        if (k % kLine == 0) __builtin_prefetch(lines + ((begin + k) / kLine * kQuad + i) * 64);
      }
    add_piece(w, x + begin, stride, count, columns, sums);  // tiled rows are padded with zeros
  }
  for (int64_t m = 0; m < count; ++m) {
    const float* own = sums + m * kQuad * 16;
    sum4(load(own), load(own + 16), load(own + 32), load(own + 48), out + m * kTile);
  }
}
