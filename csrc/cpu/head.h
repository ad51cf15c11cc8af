// The exit head: reduces fixed tiles of the vocabulary and combines them in order.
#pragma once

#include <cmath>

#include "common/checks.h"
#include "cpu/common.h"

namespace lsk {

// Partition of the vocabulary. It does not depend on the number of threads, so that sums keep their order.
struct HeadTiles {
  int64_t vocab_size, size, count;

  explicit HeadTiles(int64_t vocabulary_) : vocab_size(vocabulary_) {
    size = ((vocab_size + kHeadTiles - 1) / kHeadTiles + kPanelRows - 1) / kPanelRows * kPanelRows;
    count = (vocab_size + size - 1) / size;
  }
  int64_t begin(int64_t tile) const { return tile * size; }
  int64_t end(int64_t tile) const { return begin(tile + 1) < vocab_size ? begin(tile + 1) : vocab_size; }
};

// Head options; `shape` is that of the logits, whose first dimension is the head's rows.
inline HeadOptions head_options(const Sampling& sampling, const std::optional<Tensor>& logits,
                                std::initializer_list<int64_t> shape) {
  HeadOptions out{sampling.temperature, sampling.seed};
  if (logits.has_value()) {
    out.logits = logits_data(*logits, "logits", shape);
    out.pitch = logits->stride(0);
  }
  return out;
}

struct HeadOutputs {
  int64_t* token;
  float *logit, *logsumexp;
};

// Combines the tiles of one row, `stride` apart, in order.
struct HeadRow {
  float max, logsumexp;
  int64_t row;

  HeadRow(const HeadPartial* partials, int64_t tiles, int64_t stride) {
    HeadPartial best = partials[0];
    for (int64_t t = 1; t < tiles; ++t) {
      const HeadPartial& other = partials[t * stride];
      const float top = other.max > best.max ? other.max : best.max;
      if (std::isinf(top) && top < 0) {  // only -inf so far, whose difference would be NaN
        best.sum += other.sum;
        continue;
      }
      best.sum = best.sum * std::exp(best.max - top) + other.sum * std::exp(other.max - top);
      if (other.max > best.max) best.row = other.row;
      best.max = top;
    }
    max = best.max;
    row = best.row;
    logsumexp = best.max + std::log(best.sum);
  }
  bool finite() const { return std::isfinite(logsumexp); }
};

// The tile with the best sample; the first of equals.
inline const HeadPartial& drawn(const HeadPartial* partials, int64_t tiles, int64_t stride) {
  int64_t best = 0;
  for (int64_t t = 1; t < tiles; ++t)
    if (partials[t * stride].pick.score > partials[best * stride].pick.score) best = t;
  return partials[best * stride];
}

inline void combine(const HeadPartial* partials, int64_t tiles, int64_t rows, const HeadOptions& options,
                    HeadOutputs out) {
  for (int64_t r = 0; r < rows; ++r) {
    const HeadRow own(partials + r, tiles, rows);
    int64_t row = own.row;
    out.logit[r] = own.max;
    if (own.finite() && options.temperature && options.temperature[r] > 0) {
      const HeadPartial& best = drawn(partials + r, tiles, rows);
      row = best.pick.row;
      out.logit[r] = best.logit;
    }
    out.token[r] = !own.finite() ? -1 : options.token_map ? options.token_map[row] : row;
    out.logsumexp[r] = own.logsumexp;
  }
}

// An exit head with checked tensors; `run` evaluates rows of hidden states.
template <class T>
class ExitHead {
 public:
  ExitHead(const Tensor& norm_weight, const Tensor& head_weight, int64_t hidden_size, double eps,
           const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale)
      : width_(hidden_size), tiles_(checked(head_weight.size(0))), eps_(static_cast<float>(eps)) {
    LSK_REQUIRE(eps >= 0, "eps must not be negative, got ", eps);
    const int64_t vocab_size = tiles_.vocab_size;
    norm_ = data<T>(norm_weight, "norm_weight", {hidden_size});
    map_ = data<int64_t>(token_map, "token_map", {vocab_size});
    scale_ = data<float>(scale, "scale", {vocab_size});
    if (scale_) {
      const int8_t* rows = data<int8_t>(head_weight, "head_weight", {vocab_size, hidden_size});
      weight_ = {reinterpret_cast<const uint8_t*>(rows), hidden_size, Format::kRows};
    } else {
      weight_ = matrix<T>(head_weight, "head_weight", {vocab_size, hidden_size});
    }
  }

  int64_t vocab_size() const { return tiles_.vocab_size; }

  // Sets the token map of `options`.
  void run(const T* hidden, int64_t rows, HeadOutputs out, HeadOptions options = {}) const {
    options.token_map = map_;
    const HeadOptions* more = options.temperature || options.logits ? &options : nullptr;
    const int64_t tiled_states = tiled_size(rows, width_), count = product(tiles_.count, rows);
    Workspace workspace(Workspace::bytes<float>(tiled_states) + Workspace::bytes<HeadPartial>(count));
    float* memory = workspace.take<float>(tiled_states);
    HeadPartial* partials = workspace.take<HeadPartial>(count);
    const Kernels<T>& table = kernels<T>();
    const TiledActivations tiled{memory, rows, width_};
    table.tile(hidden, norm_, eps_, 0, rows, rows, width_, weight_, memory);
    parallel_run(num_threads(), [&](const Worker& worker) {
      const Range share = worker.share(tiles_.count);
      for (int64_t t = share.begin; t < share.end; ++t)
        table.head({tiled, weight_, scale_, more}, tiles_.begin(t), tiles_.end(t), partials + t * rows);
    });
    combine(partials, tiles_.count, rows, options, out);
  }

 private:
  static int64_t checked(int64_t vocab_size) {
    LSK_REQUIRE(vocab_size > 0, "head_weight has no rows");
    LSK_REQUIRE(vocab_size <= INT_MAX, "head_weight has ", vocab_size, " rows, expected at most ", INT_MAX);
    return vocab_size;
  }

  const int64_t width_;
  const HeadTiles tiles_;
  const float eps_;
  const T* norm_;
  Weight weight_;
  const int64_t* map_;
  const float* scale_;
};

}  // namespace lsk
