// partial_forward: layers [start, end) with five launches per layer, bit-identical to the separate ops.
//
//   qkv         rms_norm, the three projections, bias, RoPE, keys and values into the cache
//   attention   split over the positions, combined by the last block
//   linear      output projection + residual
//   swiglu      rms_norm, gate and up
//   linear      down + residual
//
// q_norm and k_norm need a whole head, but a tile has only eight of its pairs. For such models, qkv writes the
// projections, and a sixth launch applies norm and RoPE.
#include "cuda/partial_forward.h"
#include "cuda/layer_ops.h"
#include "cuda/packed_tile.cuh"
#include "cuda/rope.cuh"

namespace lsk {

template <class T, class W>
struct Projection {
  MatrixOf<T, W> weight;
  const T* bias;  // may be null
};

template <class T>
struct QkvEnd {
  Angles angles;
  Rows<T> q, k;  // [R, H C], [R, G C]
  int num_heads;
  bool rope;  // false: do not rotate q and k, and write k to `k`, not to the cache
};

template <class T, class W>
struct Projections {
  Projection<T, W> q, k, v;

  // By value: indexing the arguments would copy them to local memory.
  __device__ __forceinline__ Projection<T, W> of(int kind) const {
    return {kind == 0 ? q.weight : kind == 1 ? k.weight : v.weight, kind == 0 ? q.bias : kind == 1 ? k.bias : v.bias};
  }
};

// Eight pairs (i, i + C/2) of one head of q, k or v: rows 0-7 of a tile are the first elements, rows 8-15 the second.
struct HeadTile {
  int kind, head, pair, half;  // kind 0 q, 1 k, 2 v

  __device__ __forceinline__ HeadTile(int tile, int num_heads, int num_kv_heads, int head_dim) : half(head_dim / 2) {
    const int of_head = divide_up(half, 8), all = tile / of_head;
    pair = tile % of_head * 8;
    kind = all < num_heads ? 0 : all < num_heads + num_kv_heads ? 1 : 2;
    head = kind == 0 ? all : (all - num_heads) % num_kv_heads;
  }

  __device__ __forceinline__ int row(int i, int second) const { return head * 2 * half + pair + i + second * half; }
};

// Epilogue of qkv for one pair of row r; x is the result of linear().
template <class T>
__device__ __forceinline__ void store_pair(const QkvEnd<T>& a, const Cache<T>& cache, const HeadTile& tile, int i,
                                           int64_t r, Pair x) {
  const Place<T> place(cache, r);
  T* out = tile.kind == 0 ? a.q.row(r) + tile.head * cache.head_dim : a.k.row(r) + tile.head * cache.head_dim;
  if (tile.kind == 2 || (tile.kind == 1 && a.rope)) {
    if (!place.inside) return;
    out = (tile.kind == 1 ? cache.k : cache.v) + place.at(cache, tile.head);
  }
  if (a.rope && tile.kind < 2) x = place.rope(x, a.angles, tile.half, tile.pair + i);
  out[tile.pair + i] = from_float<T>(x.a);
  out[tile.pair + i + tile.half] = from_float<T>(x.b);
}

template <class T, class W, int GROUPS>
__global__ void __launch_bounds__(kThreads, kResident<T, W, 1, GROUPS>)
    qkv_kernel(Input<T> in, Projections<T, W> projections, QkvEnd<T> a, Cache<T> cache) {
  auto& memory = *ptx::dynamic_shared<typename Stream<T, W, 1, GROUPS>::Memory>();
  const TileWork work(in.rows, GROUPS * kTokens);
  const HeadTile tile(work.tile, a.num_heads, cache.num_kv_heads, cache.head_dim);
  const Projection<T, W> matrix = projections.of(tile.kind);
  ptx::dependents_trigger();
  Stream<T, W, 1, GROUPS> stream(in, matrix.weight, work.first, work.tokens, memory);
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    const int i = min(stream.g, tile.half - 1 - tile.pair);  // past the end, load the last pair again and ignore it
    stream.take(second, matrix.weight, tile.row(i, second));
  }
  stream.prefetch();
  const int i = threadIdx.x % 8;
  const bool inside = tile.pair + i < tile.half;
  Pair add{0.0f, 0.0f};
  if (inside && matrix.bias) add = {to_float(matrix.bias[tile.row(i, 0)]), to_float(matrix.bias[tile.row(i, 1)])};
  ptx::dependency_wait();
  stream.run();
  if (!inside) return;
  for (int token = threadIdx.x / 8; token < work.tokens; token += kThreads / 8) {
    const Pair x{round_to<T>(finish(memory.total(0, i, token), add.a, 0.0f)),
                 round_to<T>(finish(memory.total(0, i + 8, token), add.b, 0.0f))};
    store_pair(a, cache, tile, i, work.first + token, x);
  }
}

template <class T>
Cache<T> layer_cache(const ForwardArgs<T>& a, const LayerWeights<T>& w) {
  Cache<T> cache;
  cache.k = w.k_cache, cache.v = w.v_cache, cache.seq_lens = a.seq_lens, cache.slots = a.slots, cache.ahead = a.ahead;
  cache.batch = static_cast<int>(a.shape.batch), cache.rows = static_cast<int>(a.shape.rows);
  cache.num_kv_heads = static_cast<int>(a.shape.num_kv_heads), cache.capacity = static_cast<int>(a.shape.capacity);
  cache.head_dim = static_cast<int>(a.shape.head_dim), cache.num_slots = a.shape.num_slots;
  return cache;
}

template <class T>
cudaError_t project(Chain& chain, const ForwardArgs<T>& a, const LayerWeights<T>& w, const ForwardScratch<T>& scratch,
                    const Cache<T>& cache, Rows<const T> x) {
  const ForwardShape& s = a.shape;
  const bool norms = w.q_norm != nullptr || w.k_norm != nullptr;
  const Rows<T> q{scratch.q, s.queries()}, k{scratch.k, s.keys()};
  const QkvEnd<T> end{a.angles, q, k, static_cast<int>(s.num_heads), !norms};
  const Input<T> in = input<T>(x, w.attn_norm, a.eps, s.tokens(), s.hidden_size, {w.q, w.k, w.v});
  LSK_RETURN_IF_ERROR(check_weights(in, {w.q, w.k, w.v}));
  const int64_t tiles = (s.num_heads + 2 * s.num_kv_heads) * divide_up<int64_t>(s.head_dim / 2, 8);
  LSK_RETURN_IF_ERROR(with_stream<T>(w.q.format, s.tokens(), [&]<class W>(W*, auto groups) {
    constexpr int kGroups = groups.value;
    const Projections<T, W> all{{matrix_of<T, W>(w.q, s.queries()), w.q_bias},
                                {matrix_of<T, W>(w.k, s.keys()), w.k_bias},
                                {matrix_of<T, W>(w.v, s.keys()), w.v_bias}};
    const dim3 grid = TileWork::grid(s.tokens(), kGroups * kTokens, tiles);
    return launch(chain.next(grid, kThreads, sizeof(typename Stream<T, W, 1, kGroups>::Memory)),
                  qkv_kernel<T, W, kGroups>, in, all, end, cache);
  }));
  if (!norms) return cudaSuccess;
  const RopeArgs<T> rope_args{{q.data, q.pitch}, {k.data, k.pitch}, {}, w.q_norm, w.k_norm, a.eps, a.angles, q,
                              end.num_heads};
  return rope_kv_append(chain, rope_args, cache);
}

template <class T>
cudaError_t forward_layer(Chain& chain, const ForwardArgs<T>& a, const LayerWeights<T>& w,
                          const ForwardScratch<T>& scratch, Rows<const T> x) {
  const ForwardShape& s = a.shape;
  const int64_t rows = s.tokens();
  const Cache<T> cache = layer_cache(a, w);
  const Rows<T> attended{scratch.attended, s.queries()}, middle{scratch.middle, s.hidden_size};
  const Rows<T> activated{scratch.activated, s.intermediate_size};
  const auto read = [](Rows<T> r) { return Rows<const T>{r.data, r.pitch}; };
  LSK_RETURN_IF_ERROR(project(chain, a, w, scratch, cache, x));
  LSK_RETURN_IF_ERROR(verify_attention<T>(chain, {scratch.q, s.queries()}, cache, scratch.attention,
                                          scratch.attention_memory(), attended));
  LSK_RETURN_IF_ERROR(linear<T>(chain, read(attended), w.o, nullptr, x, rows, s.queries(), s.hidden_size, middle));
  LSK_RETURN_IF_ERROR(swiglu<T>(chain, read(middle), w.mlp_norm, a.eps, w.gate, w.up, rows, s.hidden_size,
                                s.intermediate_size, activated));
  return linear<T>(chain, read(activated), w.down, nullptr, read(middle), rows, s.intermediate_size, s.hidden_size,
                   a.out);
}

template <class T>
cudaError_t forward(Chain& chain, const ForwardArgs<T>& a, const LayerWeights<T>* layers, int64_t count,
                    const ForwardScratch<T>& scratch) {
  Rows<const T> x = a.in;
  for (int64_t l = 0; l < count; ++l) {
    LSK_RETURN_IF_ERROR(forward_layer(chain, a, layers[l], scratch, x));
    x = {a.out.data, a.out.pitch};
  }
  return cudaSuccess;
}

#define LSK_INSTANTIATE(T)                                                                     \
  template cudaError_t forward(Chain&, const ForwardArgs<T>&, const LayerWeights<T>*, int64_t, \
                               const ForwardScratch<T>&);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
