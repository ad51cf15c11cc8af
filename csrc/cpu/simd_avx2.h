// Sixteen floats in two AVX2 registers.

struct F16 {
  __m256 lo, hi;
};

inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
// If one operand is NaN, returns the second.
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 round(F16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 scale_half(__m256 a, __m256 n) {
  // n is in [-127, 127]; -127 makes the factor zero
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline F16 scale_by_power_of_two(F16 a, F16 n) { return {scale_half(a.lo, n.lo), scale_half(a.hi, n.hi)}; }

// a < b ? yes : no
inline F16 less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline __m256 split_half(__m256 x, __m256* exponent) {
  const __m256i bits = _mm256_castps_si256(x);
  *exponent = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
  return _mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3f800000)));
}
// x = mantissa * 2^exponent with a mantissa in [1, 2), for normal positive x.
inline F16 split(F16 x, F16* exponent) { return {split_half(x.lo, &exponent->lo), split_half(x.hi, &exponent->hi)}; }

// Sixteen words.
struct U16 {
  __m256i lo, hi;
};

inline U16 words(uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}
inline U16 load_words(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline U16 operator^(U16 a, U16 b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
inline void multiply_half(__m256i a, __m256i factor, __m256i* high, __m256i* low) {
  const __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline void multiply(U16 a, uint32_t factor, U16* high, U16* low) {
  const __m256i wide = _mm256_set1_epi64x(factor);
  multiply_half(a.lo, wide, &high->lo, &low->lo);
  multiply_half(a.hi, wide, &high->hi, &low->hi);
}
// The halves of a word convert exactly, so the sum is rounded once, as by a conversion.
inline __m256 to_floats_half(__m256i a) {
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)));
  return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
}
inline F16 to_floats(U16 a) { return {to_floats_half(a.lo), to_floats_half(a.hi)}; }

inline __m256 bf16_half(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m128i to_bf16_half(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline __m256 int8_half(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store128(void* p, __m128i a) { _mm_storeu_si128(static_cast<__m128i*>(p), a); }

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load(const bf16* p) { return {bf16_half(load128(p)), bf16_half(load128(p + 8))}; }
inline F16 load(const f16* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
inline F16 load(const int8_t* p) {
  const __m128i bytes = load128(p);
  return {int8_half(bytes), int8_half(_mm_srli_si128(bytes, 8))};
}

// Words of two bf16 each: the first numbers (`even`) and the second ones (`odd`); `zip` interleaves them.
inline F16 load_pairs(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
inline F16 even(F16 pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.hi), 16))};
}
inline F16 odd(F16 pairs) {
  const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000)));
  return {_mm256_and_ps(pairs.lo, high), _mm256_and_ps(pairs.hi, high)};
}
inline F16 zip_half(__m256 even, __m256 odd) {
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
inline void zip(F16* even, F16* odd) {
  const F16 first = zip_half(even->lo, odd->lo);
  *odd = zip_half(even->hi, odd->hi);
  *even = first;
}

inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store(bf16* p, F16 a) {
  store128(p, to_bf16_half(a.lo));
  store128(p + 8, to_bf16_half(a.hi));
}
inline void store(f16* p, F16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store128(p, _mm256_cvtps_ph(a.lo, mode));
  store128(p + 8, _mm256_cvtps_ph(a.hi, mode));
}

// The first n of sixteen, zero-padded; nothing past them is read or written.
template <class T>
inline F16 load(const T* p, int64_t n) {
  T lanes[16] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, F16 a, int64_t n) {
  T lanes[16];
  store(lanes, a);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

inline __m128 fold(F16 a) {
  const __m256 both = _mm256_add_ps(a.lo, a.hi);
  return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}
// Lane sums of four registers at once, in a fixed order.
inline void sum4(F16 a, F16 b, F16 c, F16 d, float* out) {
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
}
inline float lane_max(F16 a) {
  const __m256 both = _mm256_max_ps(a.lo, a.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// Eight registers as a matrix, transposed.
inline void transpose8(const __m256* rows, __m256* out) {
  __m256 pairs[8], quads[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
// Sixteen words of sixteen rows -> out[word * pitch + row].
inline void transpose(const float* const* rows, float* out, int64_t pitch) {
  for (int right = 0; right < 16; right += 8) {
    for (int down = 0; down < 16; down += 8) {
      __m256 words[8], columns[8];
#pragma GCC unroll 16
      for (int i = 0; i < 8; ++i) words[i] = _mm256_loadu_ps(rows[down + i] + right);
      transpose8(words, columns);
#pragma GCC unroll 16
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (right + i) * pitch + down, columns[i]);
    }
  }
}

// 16-bit integers: a block of 32 weights or activations in two registers.

// The even numbers of the block, then the odd ones, so that two shifts widen a register of bytes.
struct Block {
  __m256i even, odd;
};
using Ints = __m256i;
using Floats = __m256;
constexpr int kFarSide = 1;  // the sums of more do not fit sixteen registers
// Largest number of activation rows multiplied with a weight row at once.
template <class G>
constexpr int kFixedBlock = 6;

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Floats floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats all_floats(const float* p) { return _mm256_broadcast_ss(p); }
inline Floats all_halves(const uint8_t* p) {
  int16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline void total4(const Floats* a, float* out) {
  __m128 halves[4];
  for (int i = 0; i < 4; ++i) halves[i] = _mm_add_ps(_mm256_castps256_ps128(a[i]), _mm256_extractf128_ps(a[i], 1));
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(halves[0], halves[1]), _mm_hadd_ps(halves[2], halves[3])));
}
inline float total(Floats a) {
  const Floats four[4] = {a, a, a, a};
  float out[4];
  total4(four, out);
  return out[0];
}

inline Block all_ones() { return {_mm256_set1_epi16(1), _mm256_set1_epi16(1)}; }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints multiply(Block w, const int16_t* x) {
  return add(_mm256_madd_epi16(w.even, load256(x)), _mm256_madd_epi16(w.odd, load256(x + 16)));
}

// Four-bit values are 0 … 15 if the group has a minimum, else -8 … 7.
template <class G>
inline Block load_block(const uint8_t* values) {
  __m256i bytes;
  if constexpr (G::kBits == 8) {
    bytes = load256(values);
  } else {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1);
    bytes = _mm256_and_si256(both, _mm256_set1_epi8(15));
    if constexpr (!G::kHasZero) bytes = _mm256_sub_epi8(bytes, _mm256_set1_epi8(8));
  }
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

// Sixteen 32-bit integers, in order, as 16-bit ones.
inline __m256i narrow(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }
inline __m256i low_words(__m256i pairs) { return _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16); }
inline __m256i high_words(__m256i pairs) { return _mm256_srai_epi32(pairs, 16); }

// Thirty-two activations times `factor` as integers; reads all before writing, since `out` may alias `x`.
inline void store_block(const float* x, float factor, int16_t* out) {
  __m256i ints[4];
  for (int i = 0; i < 4; ++i)
    ints[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor)));
  const __m256i first = narrow(ints[0], ints[1]),
                second = narrow(ints[2], ints[3]);  // pairs of an even and an odd number
  store256(out, narrow(low_words(first), low_words(second)));
  store256(out + 16, narrow(high_words(first), high_words(second)));
}
