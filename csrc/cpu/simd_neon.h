// Sixteen floats in four NEON registers.

struct F16 {
  float32x4_t v[4];
};

template <class F>
inline F16 quarters(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline F16 splat(float x) {
  return quarters([=](int) { return vdupq_n_f32(x); });
}
inline F16 operator+(const F16& a, const F16& b) {
  return quarters([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F16 operator-(const F16& a, const F16& b) {
  return quarters([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F16 operator*(const F16& a, const F16& b) {
  return quarters([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F16 operator/(const F16& a, const F16& b) {
  return quarters([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F16 fma(const F16& a, const F16& b, const F16& c) {
  return quarters([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// If one operand is NaN, returns the second.
inline F16 max(const F16& a, const F16& b) {
  return quarters([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline F16 round(const F16& a) {
  return quarters([&](int i) { return vrndnq_f32(a.v[i]); });
}
inline F16 scale_by_power_of_two(const F16& a, const F16& n) {
  // n is in [-127, 127]; -127 makes the factor zero. NaN stays NaN through a.
  return quarters([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vmulq_f32(a.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}

// a < b ? yes : no
inline F16 less(const F16& a, const F16& b, const F16& yes, const F16& no) {
  return quarters([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]); });
}
// x = mantissa * 2^exponent with a mantissa in [1, 2), for normal positive x.
inline F16 split(const F16& x, F16* exponent) {
  return quarters([&](int i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]);
    const int32x4_t biased = vreinterpretq_s32_u32(vshrq_n_u32(bits, 23));
    exponent->v[i] = vcvtq_f32_s32(vsubq_s32(biased, vdupq_n_s32(127)));
    const uint32x4_t mantissa = vandq_u32(bits, vdupq_n_u32(0x7fffff));
    return vreinterpretq_f32_u32(vorrq_u32(mantissa, vdupq_n_u32(0x3f800000)));
  });
}

// Sixteen words.
struct U16 {
  uint32x4_t v[4];
};

inline U16 words(uint32_t x) {
  const uint32x4_t four = vdupq_n_u32(x);
  return {{four, four, four, four}};
}
inline U16 load_words(const uint32_t* p) {
  return {{vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)}};
}
inline U16 operator^(const U16& a, const U16& b) {
  return {{veorq_u32(a.v[0], b.v[0]), veorq_u32(a.v[1], b.v[1]), veorq_u32(a.v[2], b.v[2]), veorq_u32(a.v[3], b.v[3])}};
}
inline void multiply(const U16& a, uint32_t factor, U16* high, U16* low) {
  const uint32x2_t wide = vdup_n_u32(factor);
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a.v[i]), wide));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_u32(vget_high_u32(a.v[i]), wide));
    high->v[i] = vuzp2q_u32(first, second);
    low->v[i] = vuzp1q_u32(first, second);
  }
}
inline F16 to_floats(const U16& a) {
  return quarters([&](int i) { return vcvtq_f32_u32(a.v[i]); });
}

inline const uint16_t* bits_of(const bf16* p) { return reinterpret_cast<const uint16_t*>(p); }
inline const uint16_t* bits_of(const f16* p) { return reinterpret_cast<const uint16_t*>(p); }

inline F16 load(const float* p) {
  return quarters([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline F16 load(const bf16* p) {
  return quarters([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bits_of(p) + 4 * i), 16)); });
}
inline F16 load(const f16* p) {
  return quarters([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits_of(p) + 4 * i))); });
}
inline F16 load(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}

inline uint16x4_t to_bf16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t even = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  return vbsl_u16(vmovn_u32(vceqq_f32(a, a)), vshrn_n_u32(even, 16), vdup_n_u16(0x7fc0));
}
inline void store(float* p, const F16& a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void store(bf16* p, const F16& a) {
  for (int i = 0; i < 4; ++i) vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, to_bf16(a.v[i]));
}
inline void store(f16* p, const F16& a) {
  for (int i = 0; i < 4; ++i)
    vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}

// The first n of sixteen, zero-padded; nothing past them is read or written.
template <class T>
inline F16 load(const T* p, int64_t n) {
  T lanes[16] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, const F16& a, int64_t n) {
  T lanes[16];
  store(lanes, a);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// Words of two bf16 each: the first numbers (`even`) and the second ones (`odd`); `zip` interleaves them.
inline F16 load_pairs(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
inline F16 even(const F16& pairs) {
  return quarters([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs.v[i]), 16)); });
}
inline F16 odd(const F16& pairs) {
  const uint32x4_t high = vdupq_n_u32(0xffff0000);
  return quarters([&](int i) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pairs.v[i]), high)); });
}
inline void zip(F16* even, F16* odd) {
  const F16 first = *even, second = *odd;
  const auto of = [&](int i) {
    return i % 2 == 0 ? vzip1q_f32(first.v[i / 2], second.v[i / 2]) : vzip2q_f32(first.v[i / 2], second.v[i / 2]);
  };
  *even = quarters([&](int i) { return of(i); });
  *odd = quarters([&](int i) { return of(i + 4); });
}

inline float32x4_t fold(const F16& a) { return vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3])); }
// Lane sums of four registers at once, in a fixed order.
inline void sum4(const F16& a, const F16& b, const F16& c, const F16& d, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(fold(a), fold(b)), vpaddq_f32(fold(c), fold(d))));
}
inline float lane_max(const F16& a) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.v[0], a.v[1]), vmaxnmq_f32(a.v[2], a.v[3])));
}

// Sixteen words of sixteen rows -> out[word * pitch + row].
inline void transpose(const float* const* rows, float* out, int64_t pitch) {
  for (int right = 0; right < 16; right += 4) {
    for (int down = 0; down < 16; down += 4) {
      const float32x4_t a = vld1q_f32(rows[down] + right), b = vld1q_f32(rows[down + 1] + right);
      const float32x4_t c = vld1q_f32(rows[down + 2] + right), d = vld1q_f32(rows[down + 3] + right);
      const float32x4_t ac = vzip1q_f32(a, c), bd = vzip1q_f32(b, d);
      const float32x4_t ac2 = vzip2q_f32(a, c), bd2 = vzip2q_f32(b, d);
      float* own = out + right * pitch + down;
      vst1q_f32(own, vzip1q_f32(ac, bd));
      vst1q_f32(own + pitch, vzip2q_f32(ac, bd));
      vst1q_f32(own + 2 * pitch, vzip1q_f32(ac2, bd2));
      vst1q_f32(own + 3 * pitch, vzip2q_f32(ac2, bd2));
    }
  }
}

// 16-bit integers: a block of 32 weights or activations, in order, in four registers.

struct Block {
  int16x8_t v[4];
};
using Ints = int32x4_t;
using Floats = float32x4_t;
constexpr int kFarSide = 1;  // as in AVX2
// Largest number of activation rows multiplied with a weight row at once.
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

// Four-bit values are 0 … 15 if the group has a minimum, else -8 … 7.
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

// Thirty-two activations times `factor` as integers; reads all before writing, since `out` may alias `x`.
inline void store_block(const float* x, float factor, int16_t* out) {
  int16x4_t ints[8];
  for (int i = 0; i < 8; ++i) ints[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), factor)));
  for (int i = 0; i < 8; ++i) vst1_s16(out + 4 * i, ints[i]);
}
