// Sixteen floats in one AVX-512 register.

struct F16 {
  __m512 v;
};

inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// If one operand is NaN, returns the second.
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 scale_by_power_of_two(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// a < b ? yes : no
inline F16 less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// x = mantissa * 2^exponent with a mantissa in [1, 2), for normal positive x.
inline F16 split(F16 x, F16* exponent) {
  *exponent = {_mm512_getexp_ps(x.v)};
  return {_mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
}

// Sixteen words.
struct U16 {
  __m512i v;
};

inline U16 words(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline U16 load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline U16 operator^(U16 a, U16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline void multiply(U16 a, uint32_t factor, U16* high, U16* low) {
  const __m512i wide = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_mul_epu32(a.v, wide), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), wide);
  *high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
  *low = {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
inline F16 to_floats(U16 a) { return {_mm512_cvtepu32_ps(a.v)}; }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F16 from_bf16(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
inline __m256i to_bf16(F16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i rounded = _mm512_srli_epi32(even, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F16 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline F16 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

// The first n of sixteen, zero-padded; nothing past them is read.
inline F16 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline F16 load(const bf16* p, int64_t n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F16 load(const f16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline F16 load(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}

// Words of two bf16 each: the first numbers (`even`) and the second ones (`odd`); `zip` interleaves them.
inline F16 load_pairs(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
inline F16 even(F16 pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs.v), 16))}; }
inline F16 odd(F16 pairs) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v), high))};
}
inline void zip(F16* even, F16* odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 high = _mm512_permutex2var_ps(even->v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd->v);
  even->v = _mm512_permutex2var_ps(even->v, low, odd->v);
  odd->v = high;
}

inline void store(float* p, F16 a, int64_t n = 16) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store(bf16* p, F16 a, int64_t n = 16) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }
inline void store(f16* p, F16 a, int64_t n = 16) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Lane sums of four registers at once, in a fixed order.
inline void sum4(F16 a, F16 b, F16 c, F16 d, float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 sums = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline float lane_max(F16 a) { return _mm512_reduce_max_ps(a.v); }

// Sixteen words of sixteen rows -> out[word * pitch + row].
inline void transpose(const float* const* rows, float* out, int64_t pitch) {
  __m512 pairs[16], quads[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    const __m512 first = _mm512_loadu_ps(rows[i]), second = _mm512_loadu_ps(rows[i + 1]);
    pairs[i] = _mm512_unpacklo_ps(first, second);
    pairs[i + 1] = _mm512_unpackhi_ps(first, second);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // the four 128-bit lanes of quads[i + 4 j] are columns i, i + 4, i + 8, i + 12
    const __m512 a = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    _mm512_storeu_ps(out + i * pitch, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(out + (i + 4) * pitch, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(out + (i + 8) * pitch, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(out + (i + 12) * pitch, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
}

// 16-bit integers: a block of 32 weights or activations, in order, in one register.

using Block = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int kFarSide = 2;  // weight rows that share a read of activations outside of L1
// Largest number of activation rows multiplied with a weight row at once.
template <class G>
constexpr int kFixedBlock = G::kBlocks == 1 ? 9 : 6;

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats all_floats(const float* p) { return _mm512_set1_ps(*p); }
inline Floats all_halves(const uint8_t* p) {
  int16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(Floats a) {
  const F16 zero = splat(0);
  float out[4];
  sum4({a}, zero, zero, zero, out);
  return out[0];
}
inline void total4(const Floats* a, float* out) { sum4({a[0]}, {a[1]}, {a[2]}, {a[3]}, out); }

inline Block all_ones() { return _mm512_set1_epi16(1); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply(Block w, const int16_t* x) { return _mm512_madd_epi16(w, _mm512_loadu_si512(x)); }

// Four-bit values are 0 … 15 if the group has a minimum, else -8 … 7. A table is indexed by the low five bits of a
// word; the fifth one belongs to the next value, so the table has every entry twice.
template <class G>
inline Block load_block(const uint8_t* values) {
  if constexpr (G::kBits == 8)
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(pairs));
  const __m512i low = _mm512_set1_epi16(4), none = _mm512_setzero_si512();
  const __m512i bits = _mm512_srlv_epi16(twice, _mm512_inserti64x4(none, _mm512_castsi512_si256(low), 1));
  const __m512i least = _mm512_set1_epi16(G::kHasZero ? 0 : 8);
  const __m512i first = _mm512_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10,
                                         9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_epi16(bits, _mm512_sub_epi16(first, least));
}

// Thirty-two activations times `factor` as integers; reads all before writing, since `out` may alias `x`.
inline void store_block(const float* x, float factor, int16_t* out) {
  const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor)));
  const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), _mm512_set1_ps(factor)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(first));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm512_cvtepi32_epi16(second));
}
