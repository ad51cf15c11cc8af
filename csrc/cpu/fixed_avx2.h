// Sixteen-bit integers of a block of 32 weights or activations, in two 256-bit registers. Included inside the namespace
// of the instruction set.

// The even ones of the block, then the odd ones: so a weight's byte is widened by two shifts of its register.
struct Block {
  __m256i even, odd;
};
using Ints = __m256i;
using Floats = __m256;
constexpr int kFarSide = 1;  // sixteen registers hold the sums of no more
// Activation rows that a row of weights is multiplied with at once, at most.
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

// Four-bit ones are 0 … 15 where they have a least value, else -8 … 7.
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

// Thirty-two activations times `factor` as integers; all are read before any is written.
inline void store_block(const float* x, float factor, int16_t* out) {
  __m256i ints[4];
  for (int i = 0; i < 4; ++i)
    ints[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor)));
  const __m256i first = narrow(ints[0], ints[1]), second = narrow(ints[2], ints[3]);  // pairs of an even and an odd one
  store256(out, narrow(low_words(first), low_words(second)));
  store256(out + 16, narrow(high_words(first), high_words(second)));
}
