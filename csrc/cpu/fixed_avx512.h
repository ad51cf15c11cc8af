// Sixteen-bit integers of a block of 32 weights or activations, in order in one 512-bit register. Included inside the
// namespace of the instruction set.

using Block = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int kFarSide = 2;  // weight rows that share a read of activations which no near cache holds
// Activation rows that a row of weights is multiplied with at once, at most.
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
inline float total(Floats a) { return total(F16{a}); }
inline void total4(const Floats* a, float* out) { sum4({a[0]}, {a[1]}, {a[2]}, {a[3]}, out); }

inline Block all_ones() { return _mm512_set1_epi16(1); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply(Block w, const int16_t* x) { return _mm512_madd_epi16(w, _mm512_loadu_si512(x)); }

// Four-bit ones are 0 … 15 where they have a least value, else -8 … 7. They are looked up by the low five bits of their
// word, of which the fifth is the next value's, so the table has them twice.
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

// Thirty-two activations times `factor` as integers; all are read before any is written.
inline void store_block(const float* x, float factor, int16_t* out) {
  const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor)));
  const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), _mm512_set1_ps(factor)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(first));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm512_cvtepi32_epi16(second));
}
