// bfloat16 and float16: conversions round to nearest even; arithmetic is that of float, rounded after each operation.
#pragma once

namespace emu {

EMU_PLAIN uint16_t bf16_bits(float x) {
  const auto bits = emu_bits<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

EMU_PLAIN float bf16_value(uint16_t bits) { return emu_bits<float>(uint32_t{bits} << 16); }

EMU_PLAIN uint16_t f16_bits(float x) {
  const auto sign = static_cast<uint16_t>(emu_bits<uint32_t>(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return 0x7FFF;
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7C00;  // rounds past the largest
  int exponent = 0;
  std::frexp(size, &exponent);  // size = fraction * 2^exponent, fraction in [1/2, 1)
  exponent = std::max(exponent, -13);
  const auto digits =
      static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // a carry moves on by itself
  return sign | static_cast<uint16_t>((static_cast<uint32_t>(exponent + 13) << 10) + digits);
}

EMU_PLAIN float f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F, digits = bits & 0x3FF;
  float size = std::ldexp(static_cast<float>(exponent == 0 ? digits : digits + 1024), std::max(exponent, 1) - 25);
  if (exponent == 31)
    size = digits != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return bits & 0x8000 ? -size : size;
}

}  // namespace emu

#define EMU_HALVES(type, pair, name, pair_name, value, to_bits)                                          \
  struct alignas(4) pair {                                                                               \
    type x, y;                                                                                           \
  };                                                                                                     \
  inline type __float2##name(float x) { return type(x); }                                                \
  inline type __float2##name##_rn(float x) { return type(x); }                                           \
  inline pair __floats2##pair_name##_rn(float x, float y) { return {x, y}; }                             \
  inline pair __float2##pair_name##_rn(float x) { return {x, x}; }                                       \
  inline pair __halves2##pair_name(type x, type y) { return {x, y}; }                                    \
  inline pair make_##pair_name(type x, type y) { return {x, y}; }                                        \
  inline unsigned short __##name##_as_ushort(type x) { return x.bits; }                                  \
  inline type __ushort_as_##name(unsigned short bits) {                                                  \
    type x;                                                                                              \
    x.bits = bits;                                                                                       \
    return x;                                                                                            \
  }                                                                                                      \
  inline float __low2float(pair x) { return x.x; }                                                       \
  inline float __high2float(pair x) { return x.y; }                                                      \
  inline type __low2##name(pair x) { return x.x; }                                                       \
  inline type __high2##name(pair x) { return x.y; }                                                      \
  inline type __hadd(type a, type b) { return float(a) + float(b); }                                     \
  inline type __hsub(type a, type b) { return float(a) - float(b); }                                     \
  inline type __hmul(type a, type b) { return float(a) * float(b); }                                     \
  inline pair __hadd2(pair a, pair b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }                   \
  inline pair __hsub2(pair a, pair b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }                   \
  inline pair __hmul2(pair a, pair b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }                   \
  inline pair __hfma2(pair a, pair b, pair c) {                                                          \
    return {std::fma(float(a.x), float(b.x), float(c.x)), std::fma(float(a.y), float(b.y), float(c.y))}; \
  }
