// linear, swiglu and the exit head, of plain and packed weights, against float64; and each row alone.
#pragma once

#include <type_traits>

#include "data.h"

namespace lsk {

// A weight [rows, width], and what it stands for.
struct Weights {
  std::vector<uint8_t> bytes;
  std::vector<double> values;
  Weight weight;
};

template <class T>
Weights plain_weights(Random& random, int64_t rows, int64_t width) {
  const std::vector<T> own = random.numbers<T>(rows * width);
  Weights out;
  out.bytes.resize(own.size() * sizeof(T));
  std::memcpy(out.bytes.data(), own.data(), out.bytes.size());
  for (T one : own) out.values.push_back(value(one));
  out.weight = {out.bytes.data(), width * static_cast<int64_t>(sizeof(T)), Format::kPlain};
  return out;
}

inline void put_half(uint8_t* at, double x) {
  f16 half;
  set(half, x);
  std::memcpy(at, &half, 2);
}

inline double fp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 128 ? -size : size;
}

// Any bytes are values of a group; the scale and the least value are chosen so that these lie around [-1, 1].
template <class G>
void fill_group(Random& random, uint8_t* group, double* values) {
  const double scale = G::kIsFloat ? 0x1p-9 : G::kBits == 8 ? 0x1p-7 : 0x1p-3, least = G::kHasZero ? -0.9375 : 0;
  if (G::kIsFloat) {
    const float wide = static_cast<float>(scale);
    std::memcpy(group, &wide, 4);
  } else {
    put_half(group, scale);
    if (G::kHasZero) put_half(group + 2, least);
  }
  for (int64_t i = 0; i < G::kSize; ++i) {
    uint8_t* block = group + G::kHeader + i / kBlock * G::kBlockBytes;
    const int64_t at = i % kBlock;
    if (G::kBits == 8) {
      do block[at] = random.byte();
      while (G::kIsFloat && (block[at] & 127) == 127);  // NaN
      values[i] = scale * (G::kIsFloat ? fp8(block[at]) : static_cast<int8_t>(block[at])) + least;
    } else {
      if (at < kBlock / 2) block[at] = random.byte();
      const int bits = block[at % (kBlock / 2)] >> (at < kBlock / 2 ? 0 : 4) & 15;
      values[i] = scale * (G::kHasZero ? bits : bits - 8) + least;
    }
  }
}

inline Weights packed_weights(Random& random, Format format, int64_t rows, int64_t width) {
  Weights out;
  out.values.resize(rows * width);
  with_group(format, [&](auto group) {
    using G = decltype(group);
    out.bytes.resize(rows * G::row_bytes(width));
    for (int64_t i = 0; i < rows * width / G::kSize; ++i)
      fill_group<G>(random, out.bytes.data() + i * G::kBytes, out.values.data() + i * G::kSize);
    out.weight = {out.bytes.data(), G::row_bytes(width), format};
  });
  return out;
}

// A product, and the sum of its terms' sizes, of which its error is a part: as many roundings as terms in a lane, each
// of at most 2^-23 (bfdot rounds to odd), and 2^-15 where activations become 16-bit integers.
struct Product {
  double value = 0, size = 0;
  int64_t terms;

  Product(const double* w, const double* x, int64_t width) : terms(width) {
    for (int64_t i = 0; i < width; ++i) {
      value += w[i] * x[i];
      size += std::fabs(w[i] * x[i]);
    }
  }
  double bound(bool fixed) const { return size * (terms / 16 + 8) * 0x1p-23 + (fixed ? terms * 0x1p-15 : 0); }
};

template <class T>
std::vector<double> wide(const std::vector<T>& from) {
  std::vector<double> out;
  for (T one : from) out.push_back(value(one));
  return out;
}

template <class T>
std::vector<float> tile(const T* x, int64_t rows, int64_t width, Format format) {
  std::vector<float> memory(rows * padded(width));
  kernels<T>().tile(x, nullptr, 0, 0, rows, rows, width, {nullptr, 0, format}, memory.data());
  return memory;
}

template <class T>
struct Matmuls {
  Checks& checks;
  Random& random;
  int64_t rows, d_out, d_in;
  Format format;

  Weights weights() {
    return format == Format::kPlain ? plain_weights<T>(random, d_out, d_in)
                                    : packed_weights(random, format, d_out, d_in);
  }
  // Whether activations become 16-bit integers; the portable path leaves them as they are.
  bool fixed() const { return std::is_same_v<T, bf16> && is_integer(format); }

  void linear() {
    const std::vector<T> x = random.numbers<T>(rows * d_in), bias = random.numbers<T>(d_out);
    const std::vector<T> residual = random.numbers<T>(rows * d_out);
    const Weights w = weights();
    const auto run = [&](const T* from, const T* res, int64_t count, T* out) {
      const std::vector<float> memory = tile(from, count, d_in, format);
      const int64_t half = d_out / 2 / 16 * 16;
      const LinearArgs<T> args = {{memory.data(), count, d_in}, w.weight, bias.data(), res, out, d_out, memory.data()};
      kernels<T>().linear(args, 0, half);
      kernels<T>().linear(args, half, d_out);
    };
    std::vector<T> out(rows * d_out), alone(d_out);
    run(x.data(), residual.data(), rows, out.data());
    const std::vector<double> wide_x = wide(x);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < d_out; ++n) {
        const Product product(&w.values[n * d_in], &wide_x[r * d_in], d_in);
        const double truth = product.value + value(bias[n]) + value(residual[r * d_out + n]);
        const double bound = product.bound(fixed()) + (std::fabs(truth) + 1) * (kRounding<T> + 0x1p-22);
        checks.near("linear", value(out[r * d_out + n]), truth, bound);
      }
      run(&x[r * d_in], &residual[r * d_out], 1, alone.data());
      checks.same("a row of linear alone", alone.data(), &out[r * d_out], d_out * sizeof(T));
    }
  }

  void swiglu() {
    const std::vector<T> x = random.numbers<T>(rows * d_in);
    const Weights gate = weights(), up = weights();
    const auto run = [&](const T* from, int64_t count, T* out) {
      const std::vector<float> memory = tile(from, count, d_in, format);
      kernels<T>().swiglu({{memory.data(), count, d_in}, gate.weight, up.weight, out, d_out, memory.data()}, 0, d_out);
    };
    std::vector<T> out(rows * d_out), alone(d_out);
    run(x.data(), rows, out.data());
    const std::vector<double> wide_x = wide(x);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < d_out; ++n) {
        const Product a(&gate.values[n * d_in], &wide_x[r * d_in], d_in);
        const Product b(&up.values[n * d_in], &wide_x[r * d_in], d_in);
        const double silu = a.value / (1 + std::exp(-a.value)), truth = silu * b.value;
        const double of_a = 1.1 * (a.bound(fixed()) + std::fabs(a.value) * 0x1p-20), of_b = b.bound(fixed());
        const double bound = of_a * (std::fabs(b.value) + of_b) + of_b * std::fabs(silu);
        checks.near("swiglu", value(out[r * d_out + n]), truth, bound + std::fabs(truth) * (kRounding<T> + 0x1p-19));
      }
      run(&x[r * d_in], 1, alone.data());
      checks.same("a row of swiglu alone", alone.data(), &out[r * d_out], d_out * sizeof(T));
    }
  }

  // Maximum, its row and the log of the sum of exponentials.
  void head() {
    const std::vector<T> x = random.numbers<T>(rows * d_in);
    const Weights w = weights();
    const auto run = [&](const T* from, int64_t count, HeadPartial* out) {
      const std::vector<float> memory = tile(from, count, d_in, format);
      kernels<T>().head({{memory.data(), count, d_in}, w.weight, nullptr, nullptr}, 0, d_out, out);
    };
    std::vector<HeadPartial> out(rows);
    run(x.data(), rows, out.data());
    const std::vector<double> wide_x = wide(x);
    for (int64_t r = 0; r < rows; ++r) {
      double best = -1e300, sum = 0, bound = 0, chosen = 0;
      for (int64_t n = 0; n < d_out; ++n) {
        const Product logit(&w.values[n * d_in], &wide_x[r * d_in], d_in);
        best = std::fmax(best, logit.value);
        bound = std::fmax(bound, logit.bound(fixed()));
        sum += std::exp(logit.value);
        if (n == out[r].row) chosen = logit.value;
      }
      checks.near("the head's maximum", out[r].max, best, bound + 0x1p-20);
      checks.near("the head's row", chosen, best, 2 * bound);
      checks.near("the head's sum", out[r].max + std::log(out[r].sum), std::log(sum), bound + 0x1p-16);
      HeadPartial alone;
      run(&x[r * d_in], 1, &alone);
      checks.equal("the row of a head's row alone", alone.row, out[r].row);
      checks.same("the maximum of a head's row alone", &alone.max, &out[r].max, sizeof(float));
      checks.same("the sum of a head's row alone", &alone.sum, &out[r].sum, sizeof(float));
    }
  }
};

// 1 · a + b, for one row and one weight.
template <class T>
double sum_of(double a, double b) {
  T one, weight, bias, out;
  set(one, 1);
  set(weight, a);
  set(bias, b);
  const std::vector<float> memory = tile(&one, 1, 1, Format::kPlain);
  const Weight row = {reinterpret_cast<const uint8_t*>(&weight), sizeof(T), Format::kPlain};
  kernels<T>().linear({{memory.data(), 1, 1}, row, &bias, nullptr, &out, 1, memory.data()}, 0, 1);
  return value(out);
}

// Numbers in the middle between two of the type go to the even one; NaN stays NaN, also among a head's logits.
template <class T>
void check_rounding(Checks& checks) {
  const double first = 1 / kRounding<T>;  // from here on only even integers are of the type
  checks.equal("a tie, down", sum_of<T>(first, 1), first);
  checks.equal("a tie, up", sum_of<T>(first + 2, 1), first + 4);
  checks.equal("a tie below zero", sum_of<T>(-first - 2, -1), -first - 4);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  checks.equal("NaN stays", std::isnan(sum_of<T>(nan, 1)), true);
  std::vector<T> x(20), w(40 * 20);
  for (T& one : x) set(one, 1);
  for (T& one : w) set(one, 1);
  set(w[33 * 20 + 19], nan);
  const std::vector<float> memory = tile(x.data(), 1, 20, Format::kPlain);
  const Weight rows = {reinterpret_cast<const uint8_t*>(w.data()), 20 * sizeof(T), Format::kPlain};
  HeadPartial out;
  kernels<T>().head({{memory.data(), 1, 20}, rows, nullptr, nullptr}, 0, 40, &out);
  checks.equal("NaN in a head's sum", std::isnan(out.sum), true);
}

template <class T>
void check_matmuls(Checks& checks, Random& random) {
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 41, 9}, {3, 70, 96}, {2, 64, 1056}, {50, 33, 40}};
  for (const auto& [rows, d_out, d_in] : shapes) {
    Matmuls<T> own{checks, random, rows, d_out, d_in, Format::kPlain};
    own.linear();
    own.swiglu();
    own.head();
  }
  for (Format format : kPackedFormats)
    for (int64_t rows : {1, 2, 7}) {
      Matmuls<T> own{checks, random, rows, 37, 256, format};
      own.linear();
      own.swiglu();
      own.head();
    }
}

}  // namespace lsk
