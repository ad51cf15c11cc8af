// partial_forward: arguments and launcher, compiled in partial_forward.cu.
#pragma once

#include "common/layer_weights.h"
#include "cuda/layer_ops.h"

namespace lsk {

// Intermediate results in one allocation; its tickets must be zero (clear_tickets).
template <class T>
struct ForwardScratch {
  AttentionScratch attention;
  T *q, *k, *attended, *middle, *activated;  // [R, H C], [R, G C], [R, H C], [R, D], [R, F]

  ForwardScratch(const ForwardShape& s, void* memory)
      : attention(s.batch, s.rows, s.num_heads, s.num_kv_heads, s.capacity, s.head_dim),
        memory_(static_cast<char*>(memory)) {
    used_ = attention.bytes(s.head_dim);
    q = take(s.tokens() * s.queries());
    k = take(s.tokens() * s.keys());
    attended = take(s.tokens() * s.queries());
    middle = take(s.tokens() * s.hidden_size);
    activated = take(s.tokens() * s.intermediate_size);
  }

  static int64_t bytes(const ForwardShape& shape) { return ForwardScratch(shape, nullptr).used_; }
  void* attention_memory() const { return memory_; }

 private:
  T* take(int64_t count) {
    used_ = divide_up<int64_t>(used_, 256) * 256;
    T* const start = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory_) + used_);
    used_ += count * static_cast<int64_t>(sizeof(T));
    return start;
  }

  char* memory_;
  int64_t used_ = 0;
};

// Arguments shared by all layers. Row b M + m of `in` and `out` (which may alias) is row m of sequence b, at position
// seq_lens[b] + ahead + m.
template <class T>
struct ForwardArgs {
  ForwardShape shape;
  Angles angles;            // [>= T, C/2]
  const int64_t* seq_lens;  // [B]
  const int64_t* slots;     // [B] or null
  int64_t ahead = 0;
  float eps;
  Rows<const T> in;  // [R, D]
  Rows<T> out;       // [R, D]
};

// Runs `count` layers, from a.in to a.out.
template <class T>
cudaError_t forward(Chain& chain, const ForwardArgs<T>& a, const LayerWeights<T>* layers, int64_t count,
                    const ForwardScratch<T>& scratch);

}  // namespace lsk
