// Sixteen floats in plain C++, for compilers to vectorize.

struct F16 {
  float v[16];
};

template <class F>
inline F16 lanes(F f) {
  F16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}

inline F16 splat(float x) {
  return lanes([=](int) { return x; });
}
inline F16 operator+(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline F16 operator-(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline F16 operator*(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline F16 operator/(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline F16 fma(const F16& a, const F16& b, const F16& c) {
#ifdef __FP_FAST_FMAF
  return lanes([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}
// If one operand is NaN, returns the second.
inline F16 max(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 round(const F16& a) {
  return lanes([&](int i) { return __builtin_rintf(a.v[i]); });
}
inline float power_of_two(float n) {
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float factor;
  __builtin_memcpy(&factor, &bits, 4);
  return factor;
}
inline F16 scale_by_power_of_two(const F16& a, const F16& n) {
  // n is in [-127, 127]; -127 makes the factor zero. NaN stays NaN through a.
  return lanes([&](int i) { return a.v[i] * (n.v[i] == n.v[i] ? power_of_two(n.v[i]) : 1.0f); });
}

// a < b ? yes : no
inline F16 less(const F16& a, const F16& b, const F16& yes, const F16& no) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
// x = mantissa * 2^exponent with a mantissa in [1, 2), for normal positive x.
inline F16 split(const F16& x, F16* exponent) {
  F16 mantissa;
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x.v[i], 4);
    exponent->v[i] = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
    bits = (bits & 0x7fffff) | 0x3f800000;
    __builtin_memcpy(&mantissa.v[i], &bits, 4);
  }
  return mantissa;
}

// Sixteen words.
struct U16 {
  uint32_t v[16];
};

inline U16 words(uint32_t x) {
  U16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = x;
  return out;
}
inline U16 load_words(const uint32_t* p) {
  U16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = p[i];
  return out;
}
inline U16 operator^(const U16& a, const U16& b) {
  U16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] ^ b.v[i];
  return out;
}
inline void multiply(const U16& a, uint32_t factor, U16* high, U16* low) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.v[i]) * factor;
    high->v[i] = static_cast<uint32_t>(product >> 32);
    low->v[i] = static_cast<uint32_t>(product);
  }
}
inline F16 to_floats(const U16& a) {
  return lanes([&](int i) { return static_cast<float>(a.v[i]); });
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
  float out;
  if (exponent == 0) {
    out = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -out : out;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to at least 65520, past the largest half
    out->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal half: adding 0.5 leaves the rounded bits in the low end
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    __builtin_memcpy(&bits, &shifted, 4);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
    out->bits = static_cast<uint16_t>(sign | rounded >> 13);
  }
}

template <class T>
inline F16 load(const T* p, int64_t n = 16) {
  return lanes([=](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
inline void store(T* p, const F16& a, int64_t n = 16) {
  for (int64_t i = 0; i < n; ++i) from_float(a.v[i], p + i);
}

inline float lane_sum(F16 a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
// Lane sums of four registers at once, in a fixed order.
inline void sum4(const F16& a, const F16& b, const F16& c, const F16& d, float* out) {
  out[0] = lane_sum(a);
  out[1] = lane_sum(b);
  out[2] = lane_sum(c);
  out[3] = lane_sum(d);
}
inline float lane_max(const F16& a) {
  float out = a.v[0];
  for (int i = 1; i < 16; ++i) out = a.v[i] > out ? a.v[i] : out;
  return out;
}

// Sixteen words of sixteen rows -> out[word * pitch + row].
inline void transpose(const float* const* rows, float* out, int64_t pitch) {
  for (int word = 0; word < 16; ++word)
    for (int row = 0; row < 16; ++row) __builtin_memcpy(out + word * pitch + row, rows[row] + word, sizeof(float));
}

// Words of two bf16 each: the first numbers (`even`) and the second ones (`odd`); `zip` interleaves them.
inline F16 load_pairs(const bf16* p) {
  F16 pairs;
  __builtin_memcpy(pairs.v, p, sizeof(pairs.v));
  return pairs;
}
inline F16 halves(F16 pairs, int second) {
  for (int i = 0; i < 16; ++i) {
    bf16 two[2];
    __builtin_memcpy(two, &pairs.v[i], sizeof(two));
    pairs.v[i] = to_float(two[second]);
  }
  return pairs;
}
inline F16 even(F16 pairs) { return halves(pairs, 0); }
inline F16 odd(F16 pairs) { return halves(pairs, 1); }
inline void zip(F16* even, F16* odd) {
  const F16 first = *even, second = *odd;
  for (int i = 0; i < 8; ++i) {
    even->v[2 * i] = first.v[i];
    even->v[2 * i + 1] = second.v[i];
    odd->v[2 * i] = first.v[i + 8];
    odd->v[2 * i + 1] = second.v[i + 8];
  }
}
