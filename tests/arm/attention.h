// Attention against float64, each row alone, and the kernels of one row: norms, RoPE, softmax, noise.
#pragma once

#include "data.h"

namespace lsk {

// One key/value head: M rows of `ratio` query heads, of which row m sees length + m + 1 positions.
template <class T>
struct OneHead {
  int64_t rows, ratio, head_dim, length;
  std::vector<T> q, keys, values;

  OneHead(Random& random, int64_t rows_, int64_t ratio_, int64_t head_dim_, int64_t length_)
      : rows(rows_), ratio(ratio_), head_dim(head_dim_), length(length_) {
    q = random.numbers<T>(rows * ratio * head_dim);
    keys = random.numbers<T>((length + rows) * head_dim);
    values = random.numbers<T>((length + rows) * head_dim);
  }

  // Rows [first, first + count) of it.
  std::vector<T> run(int64_t first, int64_t count) const {
    const int64_t own = length + first, splits = (own + count + kSplit - 1) / kSplit;
    const int64_t pitch = partial_pitch(head_dim), size = count * ratio * pitch;
    std::vector<float> partial(splits * size);
    for (int64_t split = 0; split < splits; ++split)
      kernels<T>().attend(args(first, count, partial.data() + split * size), split);
    std::vector<T> out(count * ratio * head_dim);
    for (int64_t row = 0; row < count * ratio; ++row)
      kernels<T>().combine(partial.data() + row * pitch, size, (own + row / ratio) / kSplit + 1, head_dim,
                           &out[row * head_dim]);
    return out;
  }

  // All rows as one step of many takes them.
  std::vector<T> run_together() const {
    std::vector<float> partial(2 * rows * ratio * partial_pitch(head_dim));
    std::vector<T> out(rows * ratio * head_dim);
    kernels<T>().attend_rows(args(0, rows, partial.data()), out.data());
    return out;
  }

  AttentionArgs<T> args(int64_t first, int64_t count, float* partial) const {
    return {&q[first * ratio * head_dim],
            keys.data(),
            values.data(),
            keys.data(),
            length + first,
            count,
            ratio,
            head_dim,
            0,
            ratio,
            partial};
  }

  // One query row, by definition; `weighed` is the same sum of the values' sizes.
  std::vector<double> truth(int64_t row, std::vector<double>& weighed) const {
    std::vector<double> out(head_dim);
    weighed.assign(head_dim, 0);
    double sum = 0;
    for (int64_t t = 0; t <= length + row / ratio; ++t) {
      double score = 0;
      for (int64_t c = 0; c < head_dim; ++c) score += value(q[row * head_dim + c]) * value(keys[t * head_dim + c]);
      const double weight = std::exp(score / std::sqrt(static_cast<double>(head_dim)));
      sum += weight;
      for (int64_t c = 0; c < head_dim; ++c) {
        out[c] += weight * value(values[t * head_dim + c]);
        weighed[c] += weight * std::fabs(value(values[t * head_dim + c]));
      }
    }
    for (double& one : out) one /= sum;
    for (double& one : weighed) one /= sum;
    return out;
  }
};

template <class T>
void check_attention(Checks& checks, Random& random) {
  const int64_t shapes[][4] = {{1, 1, 8, 0}, {7, 3, 64, 30}, {5, 2, 72, 255}, {2, 1, 128, 600}, {9, 4, 16, 61}};
  const bool rounds = std::is_same_v<T, bf16> && std::strcmp(isa_name(), "neon_bf16") == 0;
  for (const auto& [rows, ratio, head_dim, length] : shapes) {
    const OneHead<T> head(random, rows, ratio, head_dim, length);
    const std::vector<T> out = head.run(0, rows), together = head.run_together();
    checks.same("rows of attention together", together.data(), out.data(), out.size() * sizeof(T));
    for (int64_t row = 0; row < rows * ratio; ++row) {
      std::vector<double> weighed;
      const std::vector<double> truth = head.truth(row, weighed);
      // Scores lose at most 2^-19 of numbers of order 1, and values are at most 1. Numerators that are rounded lose up
      // to 2^-8, which averages out.
      for (int64_t c = 0; c < head_dim; ++c)
        checks.near("attention", value(out[row * head_dim + c]), truth[c],
                    0x1p-16 + std::fabs(truth[c]) * kRounding<T> + (rounds ? 0x1.1p-8 * weighed[c] : 0));
    }
    for (int64_t m = 0; m < rows; ++m) {
      const std::vector<T> alone = head.run(m, 1);
      checks.same("a row of attention alone", alone.data(), &out[m * ratio * head_dim], alone.size() * sizeof(T));
    }
  }
}

template <class T>
void check_rms_norm(Checks& checks, Random& random, int64_t width) {
  const std::vector<T> x = random.numbers<T>(width), weight = random.numbers<T>(width);
  std::vector<T> out(width);
  kernels<T>().rms_norm(x.data(), weight.data(), 1e-5f, width, out.data());
  double squares = 0;
  for (T one : x) squares += value(one) * value(one);
  for (int64_t i = 0; i < width; ++i) {
    const double truth = value(x[i]) * value(weight[i]) / std::sqrt(squares / width + 1e-5);
    checks.near("rms_norm", value(out[i]), truth, std::fabs(truth) * (kRounding<T> + 0x1p-20));
  }
}

template <class T>
void check_rope(Checks& checks, Random& random, int64_t head_dim) {
  const std::vector<T> x = random.numbers<T>(head_dim);
  const std::vector<float> cos = random.numbers<float>(head_dim / 2), sin = random.numbers<float>(head_dim / 2);
  std::vector<T> out(head_dim);
  kernels<T>().rope({nullptr, cos.data(), sin.data(), head_dim, 0}, x.data(), out.data());
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const double a = value(x[i]), b = value(x[half + i]), bound = 0x1p-22;
    const double first = a * cos[i] - b * sin[i], second = b * cos[i] + a * sin[i];
    checks.near("rope", value(out[i]), first, bound + std::fabs(first) * kRounding<T>);
    checks.near("rope", value(out[half + i]), second, bound + std::fabs(second) * kRounding<T>);
  }
}

// Of logits in fp32: the table of any T has them.
inline void check_softmax(Checks& checks, Random& random, int64_t count) {
  const std::vector<float> logits = random.numbers<float>(count, 30);
  HeadPartial part;
  kernels<float>().softmax_part(logits.data(), 0.7f, 0, count, &part);
  double best = -1e300, sum = 0;
  for (float one : logits) best = std::fmax(best, one / 0.7);
  for (float one : logits) sum += std::exp(one / 0.7 - best);
  checks.near("softmax_part", part.max + std::log(part.sum), best + std::log(sum), 0x1p-15);
  std::vector<float> out(count);
  kernels<float>().softmax(logits.data(), 0.7f, static_cast<float>(best + std::log(sum)), count, out.data());
  for (int64_t i = 0; i < count; ++i) checks.near("softmax", out[i], std::exp(logits[i] / 0.7 - best) / sum, 0x1p-15);
}

// Philox by definition, of token 0: the same number on every instruction set.
inline float noise(int64_t seed, int64_t offset, uint32_t stream) {
  uint32_t word[4] = {0, static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), stream};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xd2511f53ull * word[0], c = 0xcd9e8d57ull * word[2];
    const uint32_t next[4] = {static_cast<uint32_t>(c >> 32) ^ word[1] ^ key[0], static_cast<uint32_t>(c),
                              static_cast<uint32_t>(a >> 32) ^ word[3] ^ key[1], static_cast<uint32_t>(a)};
    std::memcpy(word, next, sizeof(word));
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return (static_cast<float>(word[0]) + 0.5f) * 0x1p-32f;
}

inline void check_noise(Checks& checks, Random& random) {
  for (int i = 0; i < 50; ++i) {
    const int64_t seed = static_cast<int64_t>(random.byte()) << (i % 56), offset = random.byte();
    const float own = kernels<float>().uniform({seed, offset, kAccept}), truth = noise(seed, offset, kAccept);
    checks.same("noise", &own, &truth, sizeof(float));
  }
}

}  // namespace lsk
