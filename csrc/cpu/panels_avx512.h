// Dot products of interleaved integer weights with bf16 activations, by VNNI: each lane of a register has its own
// weight row.

// A panel has the headers of its groups, then columns of four neighbouring weights of its sixteen rows, as unsigned
// bytes (layerskip_kernels/formats.py). Activations are quantized to 16-bit integers with one scale per row, split into
// 256 · high + low, so that one instruction multiplies four of either part. Integers are summed exactly within a group,
// and no sum crosses lanes. A lane adds its groups in order, whatever the blocking, so results do not depend on the
// number of rows. An activation loses about 2^-16 of the row's largest one; rounding to bf16 has lost 2^-9 of its
// value.

constexpr int kPanelBlock = 9;           // largest number of activation rows multiplied at once
constexpr int kBlockWords = kBlock / 4;  // words of four activations

using SplitRow = IntegerRow<uint8_t, int32_t>;  // the high bytes of a block, then the low ones

// Quantizes a zero-padded fp32 row in place. NaN and infinity make the scale NaN.
inline void quantize_row_halves(float* row, int64_t padded_width) {
  const IntegerScale own(row, padded_width, 127 * 256 + 127);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(row);
  for (int64_t k = 0; k < padded_width; k += kBlock) {
    __m512i whole[2];  // read both before writing any
    for (int i = 0; i < 2; ++i) whole[i] = _mm512_cvtps_epi32((load(row + k + i * 16) * splat(own.inverse)).v);
    for (int i = 0; i < 2; ++i) {
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole[i], _mm512_set1_epi32(128)), 8);
      uint8_t* out = bytes + 2 * k + i * 16;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kBlock), _mm512_cvtepi32_epi8(whole[i]));
    }
  }
  int32_t* sums = reinterpret_cast<int32_t*>(row + padded_width / 2);
  for (int64_t k = 0; k < padded_width; k += kBlock) {
    const __m512i block = _mm512_loadu_si512(bytes + 2 * k);
    const __m512i added = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), block);
    sums[k / kBlock] = 256 * _mm512_mask_reduce_add_epi32(0x00ff, added) + _mm512_mask_reduce_add_epi32(0xff00, added);
  }
  row[padded_width / 2 + padded_width / kBlock] = own.scale;
}

// log2 of the offset that makes a weight unsigned.
template <class G>
constexpr int kExcess = G::kBits == 8 ? 7 : 3;

inline __m512i four(const uint8_t* bytes) {
  int32_t word;
  __builtin_memcpy(&word, bytes, 4);
  return _mm512_set1_epi32(word);
}
inline __m512 sixteen_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// high[m] and low[m] += weights · word number `word` of x[m]'s block.
template <int MR>
inline void multiply_column(__m512i weights, const uint8_t* const x[MR], int word, __m512i high[MR], __m512i low[MR]) {
#pragma GCC unroll 9
  for (int m = 0; m < MR; ++m) {
    high[m] = _mm512_dpbusd_epi32(high[m], weights, four(x[m] + word * 4));
    low[m] = _mm512_dpbusd_epi32(low[m], weights, four(x[m] + kBlock + word * 4));
  }
}

// One block of a panel, which begins at `columns`.
template <class G, int MR>
inline void multiply_block(const uint8_t* columns, const uint8_t* const x[MR], __m512i high[MR], __m512i low[MR]) {
#pragma GCC unroll 8
  for (int c = 0; c < G::kBlockBytes / 4; ++c) {
    const __m512i bytes = _mm512_loadu_si512(columns + c * kPanelRows * 4);
    if constexpr (G::kBits == 8) {
      multiply_column<MR>(bytes, x, c, high, low);
    } else {
      const __m512i mask = _mm512_set1_epi8(15);
      multiply_column<MR>(_mm512_and_si512(bytes, mask), x, c, high, low);
      multiply_column<MR>(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask), x, kBlockWords / 2 + c, high, low);
    }
  }
}

// out[m * kTile + 0..15] = panel · x[m]; prefetches `lines`.
template <class G, int MR>
inline void multiply_panel(const uint8_t* panel, const SplitRow x[MR], int64_t groups, const uint8_t* lines,
                           float* out) {
  constexpr int64_t kGroupBytes = G::kBytes * kPanelRows, kHeaders = G::kHeader * kPanelRows;
  const uint8_t* columns = panel + groups * kHeaders;
  __m512 sums[MR];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; ++group, panel += kHeaders) {
#pragma GCC unroll 9
    for (int64_t line = 0; line < kGroupBytes; line += 64) __builtin_prefetch(lines + group * kGroupBytes + line);
    __m512i high[MR], low[MR];
    for (int m = 0; m < MR; ++m) high[m] = low[m] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int b = 0; b < G::kBlocks; ++b) {
      const uint8_t* values[MR];
      for (int m = 0; m < MR; ++m) values[m] = x[m].values + (group * G::kBlocks + b) * 2 * kBlock;
      multiply_block<G, MR>(columns, values, high, low);
      columns += G::kBlockBytes * kPanelRows;
    }
    const __m512 scale = sixteen_halves(panel);
#pragma GCC unroll 9
    for (int m = 0; m < MR; ++m) {
      __m512i product = _mm512_add_epi32(_mm512_slli_epi32(high[m], 8), low[m]);
      __m512i sum = _mm512_set1_epi32(x[m].sums[group * G::kBlocks]);
      for (int b = 1; b < G::kBlocks; ++b)
        sum = _mm512_add_epi32(sum, _mm512_set1_epi32(x[m].sums[group * G::kBlocks + b]));
      if constexpr (G::kHasZero) {
        const __m512 least = sixteen_halves(panel + 2 * kPanelRows);
        sums[m] = _mm512_fmadd_ps(least, _mm512_cvtepi32_ps(sum), sums[m]);
      } else {
        product = _mm512_sub_epi32(product, _mm512_slli_epi32(sum, kExcess<G>));
      }
      sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sums[m]);
    }
  }
  for (int m = 0; m < MR; ++m) _mm512_store_ps(out + m * kTile, _mm512_mul_ps(sums[m], _mm512_set1_ps(x[m].scale)));
}

// As wide_tile, for panels, the first of which begins at row n, and rows that quantize_row_halves has converted.
template <class G>
inline void panel_tile(const Weight& weight, int64_t n, int64_t count, const float* x, int64_t stride, int64_t rows,
                       int64_t width, const void* next, float* tile) {
  const int64_t blocks = (rows + kPanelBlock - 1) / kPanelBlock;
  SplitRow own[kMaxRows];
  for (int64_t m = 0; m < rows; ++m) own[m] = SplitRow(x + m * stride, stride);
  for_each_rows<kPanelRows>(weight, n, count, next, [&](const int64_t* lanes, int64_t i, const uint8_t* lines) {
    for (int64_t block = 0, m = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      with_count<kPanelBlock>(end - m, [&](auto size) {
        multiply_panel<G, decltype(size)::value>(weight.row(lanes[0]), own + m, width / G::kSize, lines,
                                                 tile + m * kTile + i);
      });
      m = end;
    }
  });
}
