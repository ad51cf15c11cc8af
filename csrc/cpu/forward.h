// Layers [start, end) by one team of threads; no allocation inside a layer.
#pragma once

#include <vector>

#include "cpu/attention.h"

namespace lsk {

constexpr int64_t kRequired = 9, kAll = 14;  // weights of a layer, without and with the optional ones

struct Shape {
  int64_t batch, rows, width, heads, groups, size, features, cached, capacity;

  int64_t tokens() const { return batch * rows; }
  int64_t queries() const { return heads * size; }
  int64_t keys() const { return groups * size; }
  int64_t widest() const {
    const int64_t wide = width > queries() ? width : queries();
    return wide > features ? wide : features;
  }
};

// The weights of one layer, in the order in which the op takes them.
template <class T>
struct Layer {
  const T *attn_norm, *q, *k, *v, *o, *mlp_norm, *gate, *up, *down;
  const T *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr;
  T *k_cache, *v_cache;  // [S, G, T, C]

  Layer(const Tensor* w, bool optional, const Shape& s) {
    attn_norm = data<T>(w[0], "attn_norm", {s.width});
    q = data<T>(w[1], "q", {s.queries(), s.width});
    k = data<T>(w[2], "k", {s.keys(), s.width});
    v = data<T>(w[3], "v", {s.keys(), s.width});
    o = data<T>(w[4], "o", {s.width, s.queries()});
    mlp_norm = data<T>(w[5], "mlp_norm", {s.width});
    gate = data<T>(w[6], "gate", {s.features, s.width});
    up = data<T>(w[7], "up", {s.features, s.width});
    down = data<T>(w[8], "down", {s.width, s.features});
    if (!optional) return;
    const auto maybe = [](const Tensor& tensor, const char* name, int64_t size) {
      return tensor.numel() == 0 ? nullptr : data<T>(tensor, name, {size});
    };
    q_bias = maybe(w[9], "q_bias", s.queries());
    k_bias = maybe(w[10], "k_bias", s.keys());
    v_bias = maybe(w[11], "v_bias", s.keys());
    q_norm = maybe(w[12], "q_norm", s.size);
    k_norm = maybe(w[13], "k_norm", s.size);
  }
};

template <class T>
struct Buffers {
  T *hidden, *middle;  // [R, D]: before and after attention; `hidden` is the op's output
  T *q, *k, *v;        // [R, H C], [R, G C] twice
  T *attended, *activated;
  float *packed, *partial;
};

template <class T>
class Forward {
 public:
  Forward(const Shape& shape, const Tensor& cos, const Tensor& sin, double eps)
      : s_(shape),
        cos_(data<float>(cos, "cos", {cos.size(0), shape.size / 2})),
        sin_(data<float>(sin, "sin", {cos.size(0), shape.size / 2})),
        eps_(static_cast<float>(eps)) {}

  // Rewrites `hidden` [B, M, D], whose rows start at position `seq_lens[b]` of the cache's row `slots[b]`.
  void run(const std::vector<Layer<T>>& layers, const int64_t* seq_lens, const int64_t* slots, T* hidden) {
    check_capacity(seq_lens, s_.batch, s_.rows, s_.capacity);
    seq_lens_ = seq_lens;
    slots_ = slots;
    const int threads = num_threads();
    const int64_t tokens = s_.tokens();
    const int64_t splits = AttentionStep<T>::count_splits(seq_lens_, s_.batch, s_.rows);
    const int64_t partial = splits * tokens * s_.heads * (kPartialHead + s_.size);
    const int64_t packed = threads * packed_size(tokens, s_.widest());
    const auto size = [](int64_t count) { return Workspace::bytes<T>(count); };
    Workspace workspace(2 * size(tokens * s_.queries()) + 2 * size(tokens * s_.keys()) + size(tokens * s_.width) +
                        size(threads * tokens * s_.queries()) + size(tokens * s_.features) +
                        Workspace::bytes<float>(packed) + Workspace::bytes<float>(partial));
    b_.hidden = hidden;
    b_.middle = workspace.take<T>(tokens * s_.width);
    b_.q = workspace.take<T>(tokens * s_.queries());
    b_.k = workspace.take<T>(tokens * s_.keys());
    b_.v = workspace.take<T>(tokens * s_.keys());
    b_.attended = workspace.take<T>(threads * tokens * s_.queries());
    b_.activated = workspace.take<T>(tokens * s_.features);
    b_.packed = workspace.take<float>(packed);
    b_.partial = workspace.take<float>(partial);
    run_team(threads, [&](const Member& member) {
      for (const Layer<T>& layer : layers) {
        attention(member, layer, splits);
        mlp(member, layer, &layer == &layers.back() ? nullptr : &layer + 1);
      }
    });
  }

 private:
  Packed pack(const Member& member, const T* x, const T* norm, int64_t width) const {
    return pack_own(member, x, norm, eps_, s_.tokens(), width, b_.packed);
  }

  // Where this member's share of a matrix starts: what the step before it fetches ahead.
  static const T* first(const Member& member, const T* weight, int64_t N, int64_t width) {
    return weight + member.share(N, kUnit).begin * width;
  }

  static void linear(const Member& member, const LinearArgs<T>& args) {
    const Range share = member.share(args.N, kUnit);
    kernels<T>().linear(args, share.begin, share.end);
  }

  void attention(const Member& member, const Layer<T>& layer, int64_t splits) const {
    const Packed normed = pack(member, b_.hidden, layer.attn_norm, s_.width);
    const T* k = first(member, layer.k, s_.keys(), s_.width);
    const T* v = first(member, layer.v, s_.keys(), s_.width);
    const T* o = first(member, layer.o, s_.width, s_.queries());
    const T* gate = first(member, layer.gate, s_.features, s_.width);
    linear(member, {normed, layer.q, layer.q_bias, nullptr, b_.q, s_.queries(), k});
    linear(member, {normed, layer.k, layer.k_bias, nullptr, b_.k, s_.keys(), v});
    linear(member, {normed, layer.v, layer.v_bias, nullptr, b_.v, s_.keys(), o});
    member.wait();
    const RopeStep<T> rope{b_.q,     b_.k,          b_.v,          layer.q_norm, layer.k_norm, cos_,     sin_,
                           b_.q,     layer.k_cache, layer.v_cache, seq_lens_,    slots_,       s_.batch, s_.rows,
                           s_.heads, s_.groups,     s_.capacity,   s_.size,      eps_};
    rope.run(member);
    member.wait();
    const AttentionStep<T> step{b_.q,     layer.k_cache, layer.v_cache, seq_lens_, slots_, s_.batch,  s_.rows,
                                s_.heads, s_.groups,     s_.capacity,   s_.size,   splits, b_.partial};
    step.attend(member);
    member.wait();
    T* attended = b_.attended + member.index * s_.tokens() * s_.queries();
    step.combine(0, s_.tokens() * s_.heads, attended);
    const Packed packed = pack(member, attended, nullptr, s_.queries());
    linear(member, {packed, layer.o, nullptr, b_.hidden, b_.middle, s_.width, gate});
    member.wait();
  }

  void mlp(const Member& member, const Layer<T>& layer, const Layer<T>* following) const {
    const Range share = member.share(s_.features, kUnit);
    const Packed normed = pack(member, b_.middle, layer.mlp_norm, s_.width);
    const T* down = first(member, layer.down, s_.width, s_.features);
    const T* q = following ? first(member, following->q, s_.queries(), s_.width) : nullptr;
    kernels<T>().swiglu({normed, layer.gate, layer.up, b_.activated, s_.features, down}, share.begin, share.end);
    member.wait();
    const Packed packed = pack(member, b_.activated, nullptr, s_.features);
    linear(member, {packed, layer.down, nullptr, b_.middle, b_.hidden, s_.width, q});
    member.wait();
  }

  const Shape s_;
  const float *cos_, *sin_;
  const float eps_;
  const int64_t *seq_lens_ = nullptr, *slots_ = nullptr;
  Buffers<T> b_;
};

// Everything that a forward of layers [start, end) takes but the states.
struct LayerStack {
  const std::vector<Tensor>& weights;
  const Tensor &k_cache, &v_cache, &cos, &sin;
  const int64_t* slots;  // [B] or null
  int64_t start, end;
  double eps;

  // The sizes for `rows` rows of `width` for each of `batch` sequences, checked.
  Shape shape(int64_t batch, int64_t rows, int64_t width) const {
    const int64_t count = end - start, each = this->each(), size = k_cache.size(4);
    STD_TORCH_CHECK(0 <= start && start < end && end <= k_cache.size(0), "layers [", start, ", ", end, ") of ",
                    k_cache.size(0));
    STD_TORCH_CHECK((each == kRequired || each == kAll) && each * count == static_cast<int64_t>(weights.size()), "got ",
                    weights.size(), " weights for ", count, " layers");
    STD_TORCH_CHECK(eps >= 0, "eps must not be negative, got ", eps);
    check_head_size(size);
    const Shape out{
        batch,           rows,           width, weights[1].size(0) / size, k_cache.size(2), size, weights[6].size(0),
        k_cache.size(1), k_cache.size(3)};
    check_slots(slots, batch, out.cached);
    check_groups(out.heads, out.groups);
    STD_TORCH_CHECK(cos.size(0) >= out.capacity, "cos has ", cos.size(0), " positions, the cache's capacity is ",
                    out.capacity);
    return out;
  }

  // Tensors of one layer.
  int64_t each() const { return static_cast<int64_t>(weights.size()) / (end - start); }

  template <class T>
  std::vector<Layer<T>> layers(const Shape& s) const {
    const int64_t depth = k_cache.size(0), stride = s.cached * s.groups * s.capacity * s.size;
    T* keys = data<T>(k_cache, "k_cache", {depth, s.cached, s.groups, s.capacity, s.size});
    T* values = data<T>(v_cache, "v_cache", {depth, s.cached, s.groups, s.capacity, s.size});
    std::vector<Layer<T>> out;
    out.reserve(end - start);
    for (int64_t l = start; l < end; ++l) {
      out.emplace_back(weights.data() + (l - start) * each(), each() == kAll, s);
      out.back().k_cache = keys + l * stride;
      out.back().v_cache = values + l * stride;
    }
    return out;
  }
};

}  // namespace lsk
