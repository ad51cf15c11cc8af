// early_exit_loss on a tile of logits, in place; torch computes the products, see cpu_loss.py.
#include "cpu/common.h"

namespace lsk {
namespace {

constexpr int64_t kSmall = 1 << 14;  // entries below which one thread is faster

// Calls f(kernels, row, its logits) for every row of a tile [rows, tokens] whose first token is `begin`.
template <class F>
void for_each_row(const Tensor& logits, const Tensor& labels, int64_t begin, F f) {
  LSK_REQUIRE(begin >= 0, "begin must not be negative, got ", begin);
  const int64_t rows = logits.size(0), tokens = logits.size(1);
  const int64_t* label = data<int64_t>(labels, "labels", {rows});
  with_float_type(logits.scalar_type(), [&]<class T>(T*) {
    T* tile = data<T>(logits, "logits", {rows, tokens});
    const Kernels<T>& table = kernels<T>();
    parallel_run(rows * tokens < kSmall ? 1 : num_threads(), [&](const Worker& worker) {
      const Range share = worker.share(rows);
      for (int64_t r = share.begin; r < share.end; ++r)
        f(table, r, LossRow<T>{tile + r * tokens, tokens, label[r] < begin ? -1 : label[r] - begin});
    });
  });
}

// logits -> exp(logits - shift); shift, sum and label_logit are [rows], slope is [rows, D] or absent.
void loss_terms(const Tensor& logits, const Tensor& labels, int64_t begin, double slack, const Tensor& shift,
                const Tensor& sum, const Tensor& label_logit, const std::optional<Tensor>& slope) {
  const int64_t rows = logits.size(0), hidden_size = slope.has_value() ? slope->size(1) : 0;
  float *shifts = data<float>(shift, "shift", {rows}), *sums = data<float>(sum, "sum", {rows});
  float* chosen = data<float>(label_logit, "label_logit", {rows});
  float* slopes = data<float>(slope, "slope", {rows, hidden_size});
  for_each_row(logits, labels, begin, [&](const auto& table, int64_t r, const auto& row) {
    table.loss_terms(row, static_cast<float>(slack),
                     {shifts + r, sums + r, chosen + r, slopes + r * hidden_size, hidden_size});
  });
}

// logits -> scale * (softmax - the label's one); logsumexp and scale are [rows].
void loss_slopes(const Tensor& logits, const Tensor& labels, int64_t begin, const Tensor& logsumexp,
                 const Tensor& scale) {
  const int64_t rows = logits.size(0);
  const float *sums = data<float>(logsumexp, "logsumexp", {rows}), *scales = data<float>(scale, "scale", {rows});
  for_each_row(logits, labels, begin,
               [&](const auto& table, int64_t r, const auto& row) { table.loss_slopes(row, sums[r], scales[r]); });
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) {
  m.impl("loss_terms", TORCH_BOX(&lsk::loss_terms));
  m.impl("loss_slopes", TORCH_BOX(&lsk::loss_slopes));
}
