// Dot products of plain weight rows with tiled activations: the main loop of every matmul.

// Each product of a weight row and an activation row is summed in one register over the whole width, whatever the
// blocking, so results do not depend on the number of rows.

constexpr int kQuad = 4;       // weight rows in registers
constexpr int64_t kTile = 64;  // weight rows of one tile of results
#ifdef LSK_TILES
constexpr int64_t kMaxRows = 64;  // activation rows of one tile of results
#else
constexpr int64_t kMaxRows = 48;
#endif
constexpr int64_t kAhead = 12288;  // bytes between prefetch and use, at least; 8 and 16 KiB are slower on Zen 5

// How weights W are multiplied: by default with fp32 activations, sixteen at a time.
template <class W>
struct Dot {
  using X = float;
  static constexpr int64_t kStep = 16;
  using Lanes = F16;
  static Lanes weights(const W* p) { return load(p); }
  static Lanes weights(const W* p, int64_t n) { return load(p, n); }
  static Lanes activations(const X* p) { return load(p); }
  static F16 accumulate(F16 sum, Lanes w, Lanes x) { return fma(w, x, sum); }
  static Lanes lanes(F16 words) { return words; }
};

#ifdef LSK_BF16_DOT
// AVX-512-BF16 multiplies bf16 pairs into fp32, thirty-two at a time.
template <>
struct Dot<bf16> {
  using X = bf16;
  static constexpr int64_t kStep = 32;
  using Lanes = __m512bh;
  static Lanes weights(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Lanes weights(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
  }
  static Lanes activations(const bf16* p) { return weights(p); }
  static F16 accumulate(F16 sum, Lanes w, Lanes x) { return {_mm512_dpbf16_ps(sum.v, w, x)}; }
  // From sixteen words, each of them a pair.
  static Lanes lanes(F16 words) { return (Lanes)words.v; }
  // Thirty-two numbers, rounded to bf16, as words.
  static F16 rounded(F16 a, F16 b) { return {(__m512)_mm512_cvtne2ps_pbh(b.v, a.v)}; }
  // Interleaves two rows of pairs: the first numbers of both, and the second numbers of both.
  static void stack(F16 above, F16 below, F16* even, F16* odd) {
    const __m512i a = _mm512_castps_si512(above.v), b = _mm512_castps_si512(below.v);
    even->v = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
    odd->v = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
  }
};
#endif

#ifdef LSK_BFDOT
// Armv8.6 bfdot does the same in four registers, eight at a time.
template <>
struct Dot<bf16> {
  using X = bf16;
  static constexpr int64_t kStep = 32;
  struct Lanes {
    bfloat16x8_t v[4];
  };
  static Lanes weights(const bf16* p) {
    const bfloat16_t* from = reinterpret_cast<const bfloat16_t*>(p);
    return {{vld1q_bf16(from), vld1q_bf16(from + 8), vld1q_bf16(from + 16), vld1q_bf16(from + 24)}};
  }
  static Lanes weights(const bf16* p, int64_t n) {
    bf16 padded[32] = {};
    __builtin_memcpy(padded, p, n * sizeof(bf16));
    return weights(padded);
  }
  static Lanes activations(const bf16* p) { return weights(p); }
  static F16 accumulate(const F16& sum, const Lanes& w, const Lanes& x) {
    return quarters([&](int i) { return vbfdotq_f32(sum.v[i], w.v[i], x.v[i]); });
  }
  static Lanes lanes(const F16& words) {
    return {{vreinterpretq_bf16_f32(words.v[0]), vreinterpretq_bf16_f32(words.v[1]), vreinterpretq_bf16_f32(words.v[2]),
             vreinterpretq_bf16_f32(words.v[3])}};
  }
  // Thirty-two numbers, rounded to bf16, as words.
  static F16 rounded(const F16& a, const F16& b) {
    return quarters([&](int i) {
      const F16& from = i < 2 ? a : b;
      const bfloat16x8_t low = vcvtq_low_bf16_f32(from.v[i % 2 * 2]);
      return vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(low, from.v[i % 2 * 2 + 1]));
    });
  }
  // Interleaves two rows of pairs: the first numbers of both, and the second numbers of both.
  static void stack(const F16& above, const F16& below, F16* even, F16* odd) {
    const auto bits = [](float32x4_t words) { return vreinterpretq_u16_f32(words); };
    *even = quarters([&](int i) { return vreinterpretq_f32_u16(vtrn1q_u16(bits(above.v[i]), bits(below.v[i]))); });
    *odd = quarters([&](int i) { return vreinterpretq_f32_u16(vtrn2q_u16(bits(above.v[i]), bits(below.v[i]))); });
  }
};
#endif

// out[m * kTile + i] = rows[i] · x[m] for four weight rows and MR activation rows; prefetches `lines`.
template <class W, int MR>
inline void dot_quad(const W* const rows[kQuad], const typename Dot<W>::X* x, int64_t stride, int64_t width,
                     const char* lines, float* out) {
  using D = Dot<W>;
  constexpr int64_t kLine = 64 / sizeof(W);
  F16 sums[MR][kQuad];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < kQuad; ++i) sums[m][i] = splat(0);
  int64_t k = 0;
  for (; k + D::kStep <= width; k += D::kStep) {
    typename D::Lanes w[kQuad];
#pragma GCC unroll 4
    for (int i = 0; i < kQuad; ++i) {
      w[i] = D::weights(rows[i] + k);
      // Four rows are read side by side but prefetched in memory order: 7 % faster than row by row.
      if (k % kLine == 0) __builtin_prefetch(lines + (k / kLine * kQuad + i) * 64);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto lanes = D::activations(x + m * stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) sums[m][i] = D::accumulate(sums[m][i], w[i], lanes);
    }
  }
  if (k < width) {
    typename D::Lanes w[kQuad];
    for (int i = 0; i < kQuad; ++i) w[i] = D::weights(rows[i] + k, width - k);
    for (int m = 0; m < MR; ++m) {
      const auto lanes = D::activations(x + m * stride + k);  // tiled rows are padded with zeros
      for (int i = 0; i < kQuad; ++i) sums[m][i] = D::accumulate(sums[m][i], w[i], lanes);
    }
  }
  for (int m = 0; m < MR; ++m) sum4(sums[m][0], sums[m][1], sums[m][2], sums[m][3], out + m * kTile);
}

template <class W>
inline void dot_rows(int count, const W* const rows[kQuad], const typename Dot<W>::X* x, int64_t stride, int64_t width,
                     const char* lines, float* out) {
  switch (count) {
    case 1:
      return dot_quad<W, 1>(rows, x, stride, width, lines, out);
    case 2:
      return dot_quad<W, 2>(rows, x, stride, width, lines, out);
#if LSK_MAX_BLOCK > 2
    case 3:
#ifdef LSK_BF16_DOT  // 10 % slower than four rows on Zen 5, when weights come from memory
      dot_quad<W, 2>(rows, x, stride, width, lines, out);
      return dot_quad<W, 1>(rows, x + 2 * stride, stride, width, lines, out + 2 * kTile);
#else
      return dot_quad<W, 3>(rows, x, stride, width, lines, out);
#endif
    case 4:
      return dot_quad<W, 4>(rows, x, stride, width, lines, out);
    case 5:
      return dot_quad<W, 5>(rows, x, stride, width, lines, out);
    default:
      return dot_quad<W, 6>(rows, x, stride, width, lines, out);
#endif
  }
}

#ifdef LSK_WIDENS
#include "cpu/impl_widened.h"
#endif

// tile[m * kTile + n] = weight[n] · x[m] for up to kTile weight rows, `pitch` apart, and up to kMaxRows rows of x. Near
// the end of the tile, `next` is prefetched.
template <class W>
inline void dot_tile(const W* weight, int64_t pitch, int64_t count, const typename Dot<W>::X* x, int64_t stride,
                     int64_t rows, int64_t width, const void* next, float* tile) {
  const int64_t quad_bytes = kQuad * pitch * static_cast<int64_t>(sizeof(W));
  const int64_t ahead = quad_bytes == 0 ? 0 : (kAhead + quad_bytes - 1) / quad_bytes * quad_bytes;
  const int64_t bytes = (count + kQuad - 1) / kQuad * quad_bytes;
  const int64_t blocks = (rows + LSK_MAX_BLOCK - 1) / LSK_MAX_BLOCK;
  for (int64_t n = 0; n < count; n += kQuad) {
    const W* quad[kQuad];
    for (int64_t i = 0; i < kQuad; ++i) quad[i] = weight + (n + i < count ? n + i : count - 1) * pitch;
    const int64_t at = n / kQuad * quad_bytes + ahead;
    const char* lines =
        at < bytes ? reinterpret_cast<const char*>(weight) + at : static_cast<const char*>(next) + at - bytes;
#ifdef LSK_WIDENS
    if (blocks > 1) {
      dot_widened(quad, x, stride, rows, width, lines, tile + n);
      continue;
    }
#endif
    for (int64_t block = 0, m = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      dot_rows<W>(static_cast<int>(end - m), quad, x + m * stride, stride, width, lines, tile + m * kTile + n);
      m = end;
    }
  }
}
