// Random numbers in the kernels' storage types, their values in float64, and the count of what was checked.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace lsk {

inline double value(float x) { return x; }
inline double value(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline double value(f16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return mantissa ? std::numeric_limits<double>::quiet_NaN() : HUGE_VAL;
  const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return x.bits & 0x8000 ? -size : size;
}

// Numbers that the type has, so nothing is rounded here.
inline void set(float& out, double x) { out = static_cast<float>(x); }
inline void set(bf16& out, double x) {
  const float wide = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  out.bits = static_cast<uint16_t>(bits >> 16);
}
inline void set(f16& out, double x) {  // normal numbers and zero
  if (x == 0) return void(out.bits = 0);
  if (x != x) return void(out.bits = 0x7e00);
  int exponent;
  const int mantissa = static_cast<int>(std::frexp(std::fabs(x), &exponent) * 2048);
  out.bits = static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (mantissa & 1023));
}

// What a number may lose when it is rounded to the type, relative to it.
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 0x1p-24 : 0;
template <>
constexpr double kRounding<bf16> = 0x1p-8;
template <>
constexpr double kRounding<f16> = 0x1p-11;

class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}
  double number() { return (bits_() % 2001 - 1000.0) / 1000.0; }
  uint8_t byte() { return static_cast<uint8_t>(bits_()); }

  template <class T>
  std::vector<T> numbers(int64_t count, double size = 1) {
    std::vector<T> out(count);
    for (T& one : out) set(one, size * number());
    return out;
  }

 private:
  std::mt19937 bits_;
};

// Counts checks, and prints what fails.
class Checks {
 public:
  int done = 0, failed = 0;

  // That `actual` is within `bound` of the truth.
  void near(const char* what, double actual, double truth, double bound) {
    ++done;
    if (std::fabs(actual - truth) <= bound) return;
    if (++failed <= 20) std::printf("  %s: %.9g is not within %.3g of %.9g\n", what, actual, bound, truth);
  }
  void same(const char* what, const void* one, const void* other, size_t bytes) {
    ++done;
    if (std::memcmp(one, other, bytes) == 0) return;
    if (++failed <= 20) std::printf("  %s: not the same bits\n", what);
  }
  void equal(const char* what, int64_t one, int64_t other) {
    ++done;
    if (one == other) return;
    if (++failed <= 20) std::printf("  %s: %lld is not %lld\n", what, (long long)one, (long long)other);
  }
};

}  // namespace lsk
