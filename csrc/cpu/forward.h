// Layers [start, end) in one parallel region; no allocation inside a layer.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/layer_stack.h"
#include "cpu/attention.h"

namespace lsk {

template <class T>
struct Buffers {
  T *hidden, *middle;  // [R, D]: before and after attention; `hidden` is the op's output
  T *q, *k, *v;        // [R, H C], [R, G C] twice
  T *attended, *activated;
  float *tiled, *partial;
};

template <class T>
using Layer = LayerWeights<T>;

template <class T>
std::vector<Layer<T>> layers_of(const LayerStack& stack, const ForwardShape& shape) {
  std::vector<Layer<T>> out = stack.layers<T>(shape);
  for (const Layer<T>& layer : out) {
    check_alike(layer.q, layer.k, "q and k");
    check_alike(layer.q, layer.v, "q and v");
    check_alike(layer.gate, layer.up, "gate and up");
  }
  return out;
}

template <class T>
class Forward {
 public:
  Forward(const ForwardShape& shape, const Tensor& cos, const Tensor& sin, double eps)
      : s_(shape),
        cos_(data<float>(cos, "cos", {cos.size(0), shape.head_dim / 2})),
        sin_(data<float>(sin, "sin", {cos.size(0), shape.head_dim / 2})),
        eps_(static_cast<float>(eps)) {}

  // Updates `hidden` [B, M, D] in place; its rows start at position `seq_lens[b]` of slot `slots[b]`. Copies the state
  // before the last `num_draft_layers` layers to `before_draft_layers`.
  void run(const std::vector<Layer<T>>& layers, const int64_t* seq_lens, const int64_t* slots, T* hidden,
           int64_t num_draft_layers = 0, T* before_draft_layers = nullptr) {
    check_capacity(seq_lens, s_.batch, s_.rows, s_.capacity);
    seq_lens_ = seq_lens;
    slots_ = slots;
    const int threads = num_threads();
    const int64_t tokens = s_.tokens();
    const int64_t splits = AttentionStep<T>::count_splits(seq_lens_, s_.batch, s_.rows);
    const int64_t partial = AttentionStep<T>::partial_size(s_, splits, threads);
    const int64_t widest = std::max({s_.hidden_size, s_.queries(), s_.intermediate_size});
    const int64_t copies = num_copies(tokens, threads), tiled = product(copies, tiled_size(tokens, widest));
    const int64_t states = product(tokens, s_.hidden_size), queries = product(tokens, s_.queries());
    const int64_t keys = product(tokens, s_.keys()), activated = product(tokens, s_.intermediate_size);
    const auto bytes = [](int64_t count) { return Workspace::bytes<T>(count); };
    Workspace workspace(bytes(states) + bytes(queries) + 2 * bytes(keys) + bytes(product(copies, queries)) +
                        bytes(activated) + Workspace::bytes<float>(tiled) + Workspace::bytes<float>(partial));
    b_.hidden = hidden;
    b_.middle = workspace.take<T>(states);
    b_.q = workspace.take<T>(queries);
    b_.k = workspace.take<T>(keys);
    b_.v = workspace.take<T>(keys);
    b_.attended = workspace.take<T>(copies * queries);
    b_.activated = workspace.take<T>(activated);
    b_.tiled = workspace.take<float>(tiled);
    b_.partial = workspace.take<float>(partial);
    parallel_run(threads, [&](const Worker& worker) {
      for (const Layer<T>& layer : layers) {
        // No worker writes `hidden` before the barrier at the end of this layer's attention.
        if (num_draft_layers > 0 && worker.index == 0 && &layer == &*(layers.end() - num_draft_layers))
          std::memcpy(before_draft_layers, hidden, tokens * s_.hidden_size * sizeof(T));
        attention(worker, layer, splits);
        mlp(worker, layer, &layer == &layers.back() ? nullptr : &layer + 1);
      }
    });
  }

 private:
  TiledActivations tile(const Worker& worker, const T* x, const T* norm, int64_t hidden_size,
                        const Weight& weight) const {
    return tile_activations(worker, x, norm, eps_, s_.tokens(), hidden_size, weight, b_.tiled);
  }

  // Start of this worker's share of a matrix, for the previous step to prefetch.
  static const void* first(const Worker& worker, const Weight& weight, int64_t d_out) {
    return weight.row(worker.share(d_out, kUnit).begin);
  }

  static void linear(const Worker& worker, const LinearArgs<T>& args) {
    const Range share = worker.share(args.d_out, kUnit);
    kernels<T>().linear(args, share.begin, share.end);
  }

  void attention(const Worker& worker, const Layer<T>& layer, int64_t splits) const {
    const TiledActivations normed = tile(worker, b_.hidden, layer.attn_norm, s_.hidden_size, layer.q);
    const void* k = first(worker, layer.k, s_.keys());
    const void* v = first(worker, layer.v, s_.keys());
    const void* o = first(worker, layer.o, s_.hidden_size);
    const void* gate = first(worker, layer.gate, s_.intermediate_size);
    linear(worker, {normed, layer.q, layer.q_bias, nullptr, b_.q, s_.queries(), k});
    linear(worker, {normed, layer.k, layer.k_bias, nullptr, b_.k, s_.keys(), v});
    linear(worker, {normed, layer.v, layer.v_bias, nullptr, b_.v, s_.keys(), o});
    worker.wait();
    const RopeStep<T> rope{b_.q,     b_.k,    b_.v,          layer.q_norm,    layer.k_norm, cos_,
                           sin_,     b_.q,    layer.k_cache, layer.v_cache,   seq_lens_,    slots_,
                           s_.batch, s_.rows, s_.num_heads,  s_.num_kv_heads, s_.capacity,  s_.head_dim,
                           eps_};
    rope.run(worker);
    worker.wait();
    const AttentionStep<T> step{b_.q,         layer.k_cache,   layer.v_cache, seq_lens_,   slots_, s_.batch,  s_.rows,
                                s_.num_heads, s_.num_kv_heads, s_.capacity,   s_.head_dim, splits, b_.partial};
    T* attended = copy_of(worker, s_.tokens(), b_.attended, s_.tokens() * s_.queries());
    const Range own = rows_of(worker, s_.tokens());
    step.run(worker, {own.begin * s_.num_heads, own.end * s_.num_heads}, attended);
    const TiledActivations tiled = tile(worker, attended, nullptr, s_.queries(), layer.o);
    linear(worker, {tiled, layer.o, nullptr, b_.hidden, b_.middle, s_.hidden_size, gate});
    worker.wait();
  }

  void mlp(const Worker& worker, const Layer<T>& layer, const Layer<T>* following) const {
    const Range share = worker.share(s_.intermediate_size, kUnit);
    const TiledActivations normed = tile(worker, b_.middle, layer.mlp_norm, s_.hidden_size, layer.gate);
    const void* down = first(worker, layer.down, s_.hidden_size);
    const void* q = following ? first(worker, following->q, s_.queries()) : nullptr;
    kernels<T>().swiglu({normed, layer.gate, layer.up, b_.activated, s_.intermediate_size, down}, share.begin,
                        share.end);
    worker.wait();
    const TiledActivations tiled = tile(worker, b_.activated, nullptr, s_.intermediate_size, layer.down);
    linear(worker, {tiled, layer.down, nullptr, b_.middle, b_.hidden, s_.hidden_size, q});
    worker.wait();
  }

  const ForwardShape s_;
  const float *cos_, *sin_;
  const float eps_;
  const int64_t *seq_lens_ = nullptr, *slots_ = nullptr;
  Buffers<T> b_;
};

// Checked sizes and slots ([B] or null) of a forward pass.
struct CheckedShape {
  ForwardShape shape;
  const int64_t* slots;

  CheckedShape(const LayerStack& stack, int64_t batch, int64_t rows, int64_t hidden_size)
      : shape(stack.shape(batch, rows, hidden_size)), slots(data<int64_t>(stack.slots, "slots", {batch})) {
    check_slots(slots, batch, shape.num_slots);
  }
};

}  // namespace lsk
