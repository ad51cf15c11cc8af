// Runs the kernels of the named instruction sets against float64, without torch: what can be compiled for another
// processor and run in its emulator. The first name is the one that must be chosen by itself.
#include "attention.h"
#include "data.h"
#include "matmuls.h"

namespace lsk {

template <class T>
void check_losses(Checks& checks, Random& random, int64_t count) {
  const std::vector<T> logits = random.numbers<T>(count, 5);
  double sum = 0;
  for (T one : logits) sum += std::exp(value(one));
  const int64_t label = count / 3;
  std::vector<T> terms = logits, slopes = logits;
  float shift = -__builtin_inff(), added = 0, chosen = 0;
  kernels<T>().loss_terms({terms.data(), count, label}, 0, {&shift, &added, &chosen, nullptr, 0});
  checks.near("loss_terms", shift + std::log(added), std::log(sum), 0x1p-15);
  checks.near("the label's logit", chosen, value(logits[label]), 0);
  kernels<T>().loss_slopes({slopes.data(), count, label}, static_cast<float>(std::log(sum)), 0.5f);
  for (int64_t i = 0; i < count; ++i) {
    const double truth = 0.5 * (std::exp(value(logits[i])) / sum - (i == label));
    checks.near("loss_slopes", value(slopes[i]), truth, 0x1p-19 + std::fabs(truth) * kRounding<T>);
  }
}

template <class T>
void check_expansion(Checks& checks, Random& random) {
  for (Format format : kPackedFormats) {
    const Weights w = packed_weights(random, format, 1, 256);
    std::vector<T> out(256);
    kernels<T>().expand_row(w.weight, 0, 256, out.data());
    for (int64_t i = 0; i < 256; ++i)
      checks.near("expand_row", value(out[i]), w.values[i],
                  std::fabs(w.values[i]) * (kRounding<T> + 0x1p-23) + 0x1p-25);
  }
}

template <class T>
void check_type(Checks& checks, Random& random) {
  check_matmuls<T>(checks, random);
  check_attention<T>(checks, random);
  check_expansion<T>(checks, random);
  check_rounding<T>(checks);
  for (int64_t width : {1, 41, 576}) {
    check_rms_norm<T>(checks, random, width);
    check_losses<T>(checks, random, width + 2);
  }
  for (int64_t head_dim : {8, 64, 72}) check_rope<T>(checks, random, head_dim);
}

int check_isa(const char* name) {
  Checks checks;
  Random random(1);
  checks.equal("the instruction set can be chosen", set_isa(name), true);
  check_type<float>(checks, random);
  check_type<bf16>(checks, random);
  check_type<f16>(checks, random);
  for (int64_t count : {1, 17, 300}) check_softmax(checks, random, count);
  check_noise(checks, random);
  std::printf("%s: %d checks, %d failed\n", name, checks.done, checks.failed);
  return checks.failed;
}

// Sums of bf16 logits, whose last bits tell how they were computed: equal ones would mean that one code ran twice.
std::vector<float> fingerprint(const char* name) {
  Random random(2);
  set_isa(name);
  const Weights w = plain_weights<bf16>(random, 40, 1000);
  const std::vector<bf16> x = random.numbers<bf16>(8 * 1000);
  const std::vector<float> memory = tile(x.data(), 8, 1000, Format::kPlain);
  HeadPartial out[8];
  kernels<bf16>().head({{memory.data(), 8, 1000}, w.weight, nullptr, nullptr}, 0, 40, out);
  std::vector<float> sums;
  for (const HeadPartial& one : out) sums.push_back(one.sum);
  return sums;
}

}  // namespace lsk

int main(int count, char** names) {
  if (count < 2) return std::printf("usage: driver BEST [OTHER...]\n"), 2;
  int failed = std::strcmp(lsk::isa_name(), names[1]) != 0;
  if (failed) std::printf("%s was chosen, expected %s\n", lsk::isa_name(), names[1]);
  for (int i = 1; i < count; ++i) {
    failed += lsk::check_isa(names[i]);
    for (int other = 1; other < i; ++other)
      if (lsk::fingerprint(names[i]) == lsk::fingerprint(names[other]))
        failed += std::printf("%s and %s give the same bits\n", names[i], names[other]);
  }
  return failed != 0;
}
