// exit_head on CPU tensors: a fixed partition of the vocabulary, folded tile by tile, combined in order.
#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/common.h"

namespace lsk {
namespace {

// The vocabulary is cut the same way whatever the team, so that sums keep their order.
struct HeadTiles {
  int64_t vocabulary, size, count;

  explicit HeadTiles(int64_t vocabulary_) : vocabulary(vocabulary_) {
    size = ((vocabulary + kHeadTiles - 1) / kHeadTiles + 3) / 4 * 4;
    count = (vocabulary + size - 1) / size;
  }
  int64_t begin(int64_t tile) const { return tile * size; }
  int64_t end(int64_t tile) const { return begin(tile + 1) < vocabulary ? begin(tile + 1) : vocabulary; }
};

struct HeadOutputs {
  int64_t* token;
  float *logit, *logsumexp;
};

void combine(const HeadPartial* partials, int64_t tiles, int64_t rows, const int64_t* token_map, HeadOutputs out) {
  for (int64_t r = 0; r < rows; ++r) {
    HeadPartial best = partials[r];
    for (int64_t t = 1; t < tiles; ++t) {
      const HeadPartial& other = partials[t * rows + r];
      const float top = other.max > best.max ? other.max : best.max;
      best.sum = best.sum * std::exp(best.max - top) + other.sum * std::exp(other.max - top);
      if (other.max > best.max) best.row = other.row;
      best.max = top;
    }
    const float logsumexp = best.max + std::log(best.sum);
    out.token[r] = !std::isfinite(logsumexp) ? -1 : token_map ? token_map[best.row] : best.row;
    out.logit[r] = best.max;
    out.logsumexp[r] = logsumexp;
  }
}

// x is packed in the form that the head's weights are multiplied with; `step` computes one tile's partials.
template <class F>
void run_head(int64_t rows, const HeadTiles& tiles, HeadPartial* partials, F step) {
  run_team(num_threads(), [&](const Member& member) {
    const Range share = member.share(tiles.count);
    for (int64_t t = share.begin; t < share.end; ++t) step(tiles.begin(t), tiles.end(t), partials + t * rows);
  });
}

std::tuple<Tensor, Tensor, Tensor> exit_head(const Tensor& hidden_in, const Tensor& norm_weight,
                                             const Tensor& head_weight, double eps,
                                             const std::optional<Tensor>& token_map,
                                             const std::optional<Tensor>& scale) {
  const Tensor hidden = contiguous(hidden_in);
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = head_weight.size(0);
  STD_TORCH_CHECK(vocabulary > 0, "head_weight has no rows");
  STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
  const HeadTiles tiles(vocabulary);
  Tensor token = torch::stable::new_empty(hidden, {rows}, ScalarType::Long);
  Tensor logit = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  const int64_t* map = data<int64_t>(token_map, "token_map", {vocabulary});
  const float* factors = data<float>(scale, "scale", {vocabulary});
  Workspace workspace(Workspace::bytes<float>(packed_size(rows, width)) +
                      Workspace::bytes<HeadPartial>(tiles.count * rows));
  float* memory = workspace.take<float>(packed_size(rows, width));
  HeadPartial* partials = workspace.take<HeadPartial>(tiles.count * rows);
  with_float_type(hidden.scalar_type(), [&]<class T>(T*) {
    const T* x = static_cast<const T*>(hidden.data_ptr());
    const T* norm = data<T>(norm_weight, "norm_weight", {width});
    const Kernels<T>& table = kernels<T>();
    const Packed packed{memory, rows, width};
    if (factors) {
      const HeadArgs<int8_t> args{packed, data<int8_t>(head_weight, "head_weight", {vocabulary, width}), factors};
      table.pack_wide(x, norm, static_cast<float>(eps), rows, width, memory);
      run_head(rows, tiles, partials, [&](auto... tile) { table.head_int8(args, tile...); });
    } else {
      const HeadArgs<T> args{packed, data<T>(head_weight, "head_weight", {vocabulary, width}), nullptr};
      table.pack(x, norm, static_cast<float>(eps), rows, width, memory);
      run_head(rows, tiles, partials, [&](auto... tile) { table.head(args, tile...); });
    }
  });
  combine(partials, tiles.count, rows, map,
          {static_cast<int64_t*>(token.data_ptr()), static_cast<float*>(logit.data_ptr()),
           static_cast<float*>(logsumexp.data_ptr())});
  return {token, logit, logsumexp};
}

}  // namespace
}  // namespace lsk

STABLE_TORCH_LIBRARY_IMPL(layerskip_native, CPU, m) { m.impl("exit_head", TORCH_BOX(&lsk::exit_head)); }
