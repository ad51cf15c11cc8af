// The ops of a decoder layer; the host side is what csrc/cuda/ops does with tensors.
#include <vector>

#include "cuda/verify_attention.cu"
#include "cuda/partial_forward.cu"
#include "cuda/linear.cu"
#include "cuda/rms_norm.cu"
#include "cuda/rope_kv_append.cu"

#include "cuda_emulation/entry.h"
#include "cuda_emulation/layers.h"

using namespace lsk;

namespace {

template <class T>
Cache<T> cache_of(void* k, void* v, const int64_t* seq_lens, const int64_t* slots, int64_t batch, int64_t rows,
                  int64_t num_kv_heads, int64_t head_dim, int64_t capacity, int64_t num_slots) {
  Cache<T> cache;
  cache.k = static_cast<T*>(k), cache.v = static_cast<T*>(v), cache.seq_lens = seq_lens, cache.slots = slots;
  cache.batch = static_cast<int>(batch), cache.rows = static_cast<int>(rows),
  cache.num_kv_heads = static_cast<int>(num_kv_heads);
  cache.capacity = static_cast<int>(capacity), cache.head_dim = static_cast<int>(head_dim), cache.num_slots = num_slots;
  return cache;
}

}  // namespace

EMULATED(rms_norm)(const void* x, const void* weight, void* out, int64_t rows, int64_t width, float eps,
                   int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    return rms_norm<T>(chain, {static_cast<const T*>(x), width}, static_cast<const T*>(weight), eps, rows, width,
                       {static_cast<T*>(out), width});
  });
}

EMULATED(linear)(const void* x, const void* weight, const void* bias, const void* residual, void* out, int64_t rows,
                 int64_t d_in, int64_t d_out, int64_t format, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    return linear<T>(chain, {static_cast<const T*>(x), d_in}, emu::weight<T>(weight, d_in, format),
                     static_cast<const T*>(bias), {static_cast<const T*>(residual), d_out}, rows, d_in, d_out,
                     {static_cast<T*>(out), d_out});
  });
}

EMULATED(swiglu)(const void* x, const void* gate, const void* up, void* out, int64_t rows, int64_t d_in,
                 int64_t intermediate_size, int64_t gate_format, int64_t up_format, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    return swiglu<T>(chain, {static_cast<const T*>(x), d_in}, nullptr, 0.0f, emu::weight<T>(gate, d_in, gate_format),
                     emu::weight<T>(up, d_in, up_format), rows, d_in, intermediate_size,
                     {static_cast<T*>(out), intermediate_size});
  });
}

EMULATED(rope_kv_append)(const void* q, const void* k, const void* v, const float* cos, const float* sin, void* k_cache,
                         void* v_cache, const int64_t* seq_lens, const int64_t* slots, void* out, int64_t batch,
                         int64_t rows, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t capacity,
                         int64_t num_slots, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    RopeArgs<T> args{};
    args.q = {static_cast<const T*>(q), num_heads * head_dim};
    args.k = {static_cast<const T*>(k), num_kv_heads * head_dim};
    args.v = {static_cast<const T*>(v), num_kv_heads * head_dim};
    args.angles = {cos, sin};
    args.q_out = {static_cast<T*>(out), num_heads * head_dim};
    args.num_heads = static_cast<int>(num_heads);
    Chain chain(nullptr);
    return rope_kv_append<T>(
        chain, args,
        cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, num_kv_heads, head_dim, capacity, num_slots));
  });
}

// The rows of a sequence that one launch takes, with the limit of the library.
EMULATED(rows_at_once)(int64_t* rows_at_once, int64_t batch, int64_t rows, int64_t num_heads, int64_t num_kv_heads,
                       int64_t head_dim, int64_t capacity) {
  *rows_at_once = AttentionScratch(batch, rows, num_heads, num_kv_heads, capacity, head_dim).rows_at_once;
  return cudaSuccess;
}

// The entry's scratch is the test's: `memory` of `attention_bytes`.
EMULATED(attention_bytes)(int64_t* bytes, int64_t batch, int64_t rows, int64_t num_heads, int64_t num_kv_heads,
                          int64_t head_dim, int64_t capacity, int64_t limit) {
  *bytes = AttentionScratch(batch, rows, num_heads, num_kv_heads, capacity, head_dim, limit).bytes(head_dim);
  return cudaSuccess;
}

EMULATED(verify_attention)(const void* q, void* k_cache, void* v_cache, const int64_t* seq_lens, const int64_t* slots,
                           void* out, void* memory, int64_t batch, int64_t rows, int64_t num_heads,
                           int64_t num_kv_heads, int64_t head_dim, int64_t capacity, int64_t limit, int64_t num_slots,
                           int64_t dtype) {
  const AttentionScratch scratch(batch, rows, num_heads, num_kv_heads, capacity, head_dim, limit);
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    LSK_RETURN_IF_ERROR(clear_tickets(chain, scratch, memory));
    return verify_attention<T>(
        chain, {static_cast<const T*>(q), num_heads * head_dim},
        cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, num_kv_heads, head_dim, capacity, num_slots),
        scratch, memory, {static_cast<T*>(out), num_heads * head_dim});
  });
}

// sizes: B, M, D, H, G, C, F, T, S, layers; weights: fourteen a layer, some null, and their formats; caches: k and v of
// each layer.
EMULATED(forward_bytes)(int64_t* bytes, const int64_t* sizes, int64_t dtype) {
  const ForwardShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    *bytes = ForwardScratch<T>::bytes(shape);
    return cudaSuccess;
  });
}

EMULATED(partial_forward)(const void* hidden, void** weights, const int64_t* formats, void** caches, const float* cos,
                          const float* sin, const int64_t* seq_lens, const int64_t* slots, void* out, void* memory,
                          const int64_t* sizes, int64_t ahead, float eps, int64_t dtype) {
  const ForwardShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    const std::vector<LayerWeights<T>> layers = emu::layers<T>(weights, formats, caches, 0, sizes[9], shape);
    ForwardArgs<T> args{};
    args.shape = shape, args.angles = {cos, sin}, args.seq_lens = seq_lens, args.slots = slots, args.ahead = ahead;
    args.eps = eps;
    args.in = {static_cast<const T*>(hidden), shape.hidden_size};
    args.out = {static_cast<T*>(out), shape.hidden_size};
    const ForwardScratch<T> scratch(shape, memory);
    Chain chain(nullptr);
    LSK_RETURN_IF_ERROR(clear_tickets(chain, scratch.attention, memory));
    return forward<T>(chain, args, layers.data(), sizes[9], scratch);
  });
}
