// The ops of a decoder layer; the host side is what csrc/cuda/ops does with tensors.
#include <vector>

#include "cuda/attention.cuh"
#include "cuda/forward.cuh"
#include "cuda/linear.cuh"
#include "cuda/norm.cuh"
#include "cuda/rope.cuh"

#include "cuda_emulation/entry.h"

using namespace lsk;

namespace {

template <class T>
Cache<T> cache_of(void* k, void* v, const int64_t* seq_lens, const int64_t* slots, int64_t batch, int64_t rows,
                  int64_t groups, int64_t size, int64_t capacity, int64_t slot_count) {
  Cache<T> cache;
  cache.k = static_cast<T*>(k), cache.v = static_cast<T*>(v), cache.seq_lens = seq_lens, cache.slots = slots;
  cache.batch = static_cast<int>(batch), cache.rows = static_cast<int>(rows), cache.groups = static_cast<int>(groups);
  cache.capacity = static_cast<int>(capacity), cache.size = static_cast<int>(size), cache.slot_count = slot_count;
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
                 int64_t depth, int64_t outputs, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    return linear<T>(chain, {static_cast<const T*>(x), depth}, static_cast<const T*>(weight),
                     static_cast<const T*>(bias), {static_cast<const T*>(residual), outputs}, rows, depth, outputs,
                     {static_cast<T*>(out), outputs});
  });
}

EMULATED(swiglu)(const void* x, const void* gate, const void* up, void* out, int64_t rows, int64_t depth,
                 int64_t features, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    return swiglu<T>(chain, {static_cast<const T*>(x), depth}, nullptr, 0.0f, static_cast<const T*>(gate),
                     static_cast<const T*>(up), rows, depth, features, {static_cast<T*>(out), features});
  });
}

EMULATED(rope_kv_append)(const void* q, const void* k, const void* v, const float* cos, const float* sin, void* k_cache,
                         void* v_cache, const int64_t* seq_lens, const int64_t* slots, void* out, int64_t batch,
                         int64_t rows, int64_t heads, int64_t groups, int64_t size, int64_t capacity,
                         int64_t slot_count, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    RopeArgs<T> args{};
    args.q = {static_cast<const T*>(q), heads * size};
    args.k = {static_cast<const T*>(k), groups * size};
    args.v = {static_cast<const T*>(v), groups * size};
    args.angles = {cos, sin};
    args.q_out = {static_cast<T*>(out), heads * size};
    args.heads = static_cast<int>(heads);
    Chain chain(nullptr);
    return rope_kv_append<T>(
        chain, args, cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, groups, size, capacity, slot_count));
  });
}

// The entry's scratch is the test's: `memory` of `attention_bytes`.
EMULATED(attention_bytes)(int64_t* bytes, int64_t batch, int64_t rows, int64_t heads, int64_t groups, int64_t size,
                          int64_t capacity, int64_t limit) {
  *bytes = AttentionScratch(batch, rows, heads, groups, capacity, size, limit).bytes(size);
  return cudaSuccess;
}

EMULATED(verify_attention)(const void* q, void* k_cache, void* v_cache, const int64_t* seq_lens, const int64_t* slots,
                           void* out, void* memory, int64_t batch, int64_t rows, int64_t heads, int64_t groups,
                           int64_t size, int64_t capacity, int64_t limit, int64_t slot_count, int64_t dtype) {
  const AttentionScratch scratch(batch, rows, heads, groups, capacity, size, limit);
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    Chain chain(nullptr);
    LSK_LAUNCH(clear_tickets(chain, scratch, memory));
    return verify_attention<T>(
        chain, {static_cast<const T*>(q), heads * size},
        cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, groups, size, capacity, slot_count), scratch,
        memory, {static_cast<T*>(out), heads * size});
  });
}

// sizes: B, M, D, H, G, C, F, T, S, layers; weights: fourteen a layer, some null; caches: k and v of each layer.
EMULATED(forward_bytes)(int64_t* bytes, const int64_t* sizes, int64_t dtype) {
  const ForwardShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    *bytes = ForwardScratch<T>::bytes(shape);
    return cudaSuccess;
  });
}

EMULATED(partial_forward)(const void* hidden, void** weights, void** caches, const float* cos, const float* sin,
                          const int64_t* seq_lens, const int64_t* slots, void* out, void* memory, const int64_t* sizes,
                          int64_t ahead, float eps, int64_t dtype) {
  const ForwardShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    std::vector<LayerWeights<T>> layers;
    for (int64_t l = 0; l < sizes[9]; ++l) {
      const auto at = [&](int i) { return static_cast<const T*>(weights[14 * l + i]); };
      layers.push_back({at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), at(12),
                        at(13), static_cast<T*>(caches[2 * l]), static_cast<T*>(caches[2 * l + 1])});
    }
    ForwardArgs<T> args{};
    args.shape = shape, args.angles = {cos, sin}, args.seq_lens = seq_lens, args.slots = slots, args.ahead = ahead;
    args.eps = eps;
    args.in = {static_cast<const T*>(hidden), shape.width};
    args.out = {static_cast<T*>(out), shape.width};
    const ForwardScratch<T> scratch(shape, memory);
    Chain chain(nullptr);
    LSK_LAUNCH(clear_tickets(chain, scratch.attention, memory));
    return forward<T>(chain, args, layers.data(), sizes[9], scratch);
  });
}
