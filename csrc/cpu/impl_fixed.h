// Dot products of packed integer weights with bf16 activations, which are turned into 16-bit integers with a scale a
// row. Included inside the namespace of the instruction set; 256-bit instructions serve all of them.

// Products of two integers are added up exactly within a group, then converted and scaled: two instructions for sixteen
// weights where fp32 takes four. An activation loses at most 2^-16 of the row's largest, a bf16 has lost 2^-9 of
// itself. Each lane of a row's sum adds its groups in their order, whatever the blocking, so a row's bits never depend
// on how many rows travel with it.

// A row of activations in the place of `padded(width)` floats: for each 32 columns the sixteen even ones, then the odd
// ones; a 1/8 of the sum of each 32; the scale.
struct FixedRow {
  const int16_t* values;
  const float* sums;
  float scale;

  FixedRow(const float* row, int64_t padded_width)
      : values(reinterpret_cast<const int16_t*>(row)),
        sums(row + padded_width / 2),
        scale(sums[padded_width / kBlock]) {}
};

inline __m256i ints(__m256 x) { return _mm256_cvtps_epi32(x); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
// Sixteen 32-bit integers, in order, as 16-bit ones.
inline __m256i narrow(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }
inline __m256i low_words(__m256i pairs) { return _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16); }
inline __m256i high_words(__m256i pairs) { return _mm256_srai_epi32(pairs, 16); }

// Thirty-two integers in order as sixteen even and sixteen odd 16-bit ones.
inline void pack_words(const __m256i x[4], int16_t* out) {
  const __m256i first = narrow(x[0], x[1]), second = narrow(x[2], x[3]);  // pairs of an even and an odd one
  store256(out, narrow(low_words(first), low_words(second)));
  store256(out + 16, narrow(high_words(first), high_words(second)));
}

inline float total(__m256 a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_hadd_ps(four, four);
  return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}

// A zero-padded row of fp32 in the form above, in place of itself. NaN and infinity make the scale NaN.
inline void fix_row(float* row, int64_t padded_width) {
  constexpr float kMost = 32767.0f, kLeast = 1e-34f;  // the inverse of what is less would overflow; such a row is zero
  F16 largest = splat(0), broken = splat(0);
  for (int64_t i = 0; i < padded_width; i += 16) {
    const F16 x = load(row + i);
    largest = max(max(x, splat(0) - x), largest);
    broken = fma(x, splat(0), broken);
  }
  const float most = lane_max(largest), inverse = most > kLeast ? kMost / most : 0.0f;
  const float scale = (most > kLeast ? most / kMost : 0.0f) + total(broken);
  float* sums = row + padded_width / 2;
  int16_t* out = reinterpret_cast<int16_t*>(row);
  for (int64_t k = 0; k < padded_width; k += kBlock) {
    __m256i x[4];
    for (int i = 0; i < 4; ++i) x[i] = ints(_mm256_mul_ps(_mm256_loadu_ps(row + k + 8 * i), _mm256_set1_ps(inverse)));
    pack_words(x, out + k);  // not beyond what has been read
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t k = 0; k < padded_width; k += kBlock) {
    const __m256i added =
        _mm256_add_epi32(_mm256_madd_epi16(load256(out + k), ones), _mm256_madd_epi16(load256(out + k + 16), ones));
    sums[k / kBlock] = 0.125f * total(_mm256_cvtepi32_ps(added));
  }
  sums[padded_width / kBlock] = scale;
}

// Thirty-two integers as bytes, in order; four-bit ones are 0 … 15 where they have a least value, else -8 … 7.
template <class G>
inline __m256i block_bytes(const uint8_t* values) {
  if constexpr (G::kBits == 8) {
    return load256(values);
  } else {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1);
    const __m256i bits = _mm256_and_si256(both, _mm256_set1_epi8(15));
    return G::kHasZero ? bits : _mm256_sub_epi8(bits, _mm256_set1_epi8(8));
  }
}

inline __m256 broadcast_half(const uint8_t* p) {
  int16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}

// sums[m][i] += rows[i] · x[m], of one group.
template <class G, int WR, int MR>
inline void add_group(const uint8_t* const rows[WR], const FixedRow x[MR], int64_t group, __m256 sums[MR][WR]) {
#pragma GCC unroll 4
  for (int i = 0; i < WR; ++i) {
    const uint8_t* header = rows[i] + group * G::kBytes;
    __m256i products[MR];
#pragma GCC unroll 4
    for (int b = 0; b < G::kBlocks; ++b) {
      const __m256i bytes = block_bytes<G>(header + G::kHeader + b * G::kBlockBytes);
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) {
        const int16_t* own = x[m].values + (group * G::kBlocks + b) * kBlock;
        const __m256i added =
            _mm256_add_epi32(_mm256_madd_epi16(even, load256(own)), _mm256_madd_epi16(odd, load256(own + 16)));
        products[m] = b == 0 ? added : _mm256_add_epi32(products[m], added);
      }
    }
    const __m256 scale = G::kHasScale ? broadcast_half(header) : _mm256_set1_ps(1.0f);
    const __m256 least = G::kHasZero ? broadcast_half(header + 2) : _mm256_setzero_ps();
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      sums[m][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[m]), scale, sums[m][i]);
      if constexpr (G::kHasZero)
#pragma GCC unroll 4
        for (int b = 0; b < G::kBlocks; ++b)
          sums[m][i] = _mm256_fmadd_ps(least, _mm256_broadcast_ss(x[m].sums + group * G::kBlocks + b), sums[m][i]);
    }
  }
}

// out[m * kTile + i] = rows[i] · x[m] for WR weight rows and MR activation rows.
template <class G, int WR, int MR>
inline void fixed_rows(const uint8_t* const rows[WR], const float* x, int64_t stride, int64_t width,
                       const uint8_t* lines, float* out) {
  const auto row = [&](int m) { return FixedRow(x + (m < MR ? m : 0) * stride, stride); };
  const FixedRow own[6] = {row(0), row(1), row(2), row(3), row(4), row(5)};
  __m256 sums[MR][WR];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < WR; ++i) sums[m][i] = _mm256_setzero_ps();
  constexpr int64_t kLines = (WR * G::kBytes + 63) / 64;
  for (int64_t group = 0; group < width / G::kSize; ++group) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(lines + group * WR * G::kBytes + line * 64);
    add_group<G, WR, MR>(rows, own, group, sums);
  }
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < WR; ++i) out[m * kTile + i] = total(sums[m][i]) * own[m].scale;
}

// As wide_tile, of rows that fix_row has made. Four rows of weights hide each other's latency; where activation rows do
// that, one streams best.
template <class G>
inline void fixed_tile(const Weight& weight, int64_t n, int64_t count, const float* x, int64_t stride, int64_t rows,
                       int64_t width, const void* next, float* tile) {
  if (rows == 1)
    return for_each_rows<4>(weight, n, count, next, [&](const uint8_t* const* own, int64_t i, const uint8_t* lines) {
      fixed_rows<G, 4, 1>(own, x, stride, width, lines, tile + i);
    });
  if (rows == 2)
    return for_each_rows<2>(weight, n, count, next, [&](const uint8_t* const* own, int64_t i, const uint8_t* lines) {
      fixed_rows<G, 2, 2>(own, x, stride, width, lines, tile + i);
    });
  const int64_t blocks = (rows + 5) / 6;
  for_each_rows<1>(weight, n, count, next, [&](const uint8_t* const* own, int64_t i, const uint8_t* lines) {
    for (int64_t block = 0, m = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      with_count<6>(end - m, [&](auto size) {
        fixed_rows<G, 1, decltype(size)::value>(own, x + m * stride, stride, width, lines, tile + m * kTile + i);
      });
      m = end;
    }
  });
}
