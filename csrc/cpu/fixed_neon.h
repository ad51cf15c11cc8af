// Sixteen-bit integers of a block of 32 weights or activations, in order in four NEON registers. Included inside the
// namespace of the instruction set.

struct Block {
  int16x8_t v[4];
};
using Ints = int32x4_t;
using Floats = float32x4_t;
constexpr int kFarSide = 1;  // as in AVX2
// Activation rows that a row of weights is multiplied with at once, at most.
template <class G>
constexpr int kFixedBlock = 6;

inline Floats zero_floats() { return vdupq_n_f32(0); }
inline Floats floats(Ints x) { return vcvtq_f32_s32(x); }
inline Floats all_floats(const float* p) { return vdupq_n_f32(*p); }
inline Floats all_halves(const uint8_t* p) {
  uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)));
}
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline float total(Floats a) { return vaddvq_f32(a); }
inline void total4(const Floats* a, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
}

inline Block all_ones() {
  const int16x8_t ones = vdupq_n_s16(1);
  return {{ones, ones, ones, ones}};
}
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Ints multiply(const Block& w, const int16_t* x) {
  Ints low = vdupq_n_s32(0), high = low;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int16x8_t own = vld1q_s16(x + 8 * i);
    low = vmlal_s16(low, vget_low_s16(w.v[i]), vget_low_s16(own));
    high = vmlal_high_s16(high, w.v[i], own);
  }
  return add(low, high);
}

// Four-bit ones are 0 … 15 where they have a least value, else -8 … 7.
template <class G>
inline Block load_block(const uint8_t* values) {
  int8x16_t first, second;
  if constexpr (G::kBits == 8) {
    first = vreinterpretq_s8_u8(vld1q_u8(values));
    second = vreinterpretq_s8_u8(vld1q_u8(values + 16));
  } else {
    const uint8x16_t pairs = vld1q_u8(values);
    const int8x16_t least = vdupq_n_s8(G::kHasZero ? 0 : 8);
    first = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15))), least);
    second = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)), least);
  }
  return {{vmovl_s8(vget_low_s8(first)), vmovl_high_s8(first), vmovl_s8(vget_low_s8(second)), vmovl_high_s8(second)}};
}

// Thirty-two activations times `factor` as integers; all are read before any is written.
inline void store_block(const float* x, float factor, int16_t* out) {
  int16x4_t ints[8];
  for (int i = 0; i < 8; ++i) ints[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), factor)));
  for (int i = 0; i < 8; ++i) vst1_s16(out + 4 * i, ints[i]);
}
