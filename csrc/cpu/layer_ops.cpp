// The ops of a decoder layer on CPU tensors: rms_norm, linear, swiglu, rope_kv_append, verify_attention, dequantize,
// and interleave.
#include "cpu/attention.h"

namespace lsk {
namespace {

using torch::stable::new_empty;

Tensor rms_norm(const Tensor& x_in, const Tensor& weight, double eps) {
  const Tensor x = contiguous(x_in);
  LSK_REQUIRE(x.dim() >= 1 && eps >= 0, "x needs a dimension, and eps must not be negative");
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  Tensor out = torch::stable::empty_like(x);
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    const T* from = static_cast<const T*>(x.data_ptr());
    const T* norm = data<T>(weight, "weight", {width});
    T* to = static_cast<T*>(out.data_ptr());
    const Kernels<T>& table = kernels<T>();
    const bool small = rows * width < (1 << 15);  // starting threads costs more than such a norm
    parallel_run(small ? 1 : num_threads(), [&](const Worker& worker) {
      const Range share = worker.share(rows);
      for (int64_t r = share.begin; r < share.end; ++r)
        table.rms_norm(from + r * width, norm, static_cast<float>(eps), width, to + r * width);
    });
  });
  return out;
}

// Tiles x once and shares [0, d_out) among the workers.
template <class T, class F>
void share_rows(const T* x, int64_t rows, int64_t d_in, int64_t d_out, const Weight& weight, F step) {
  if (rows == 0 || d_out == 0) return;
  const int threads = num_threads();
  Workspace workspace(Workspace::bytes<float>(tiled_size(rows, d_in)));
  float* memory = workspace.take<float>(tiled_size(rows, d_in));
  const bool few = rows < kFewRows;
  if (few) kernels<T>().tile(x, nullptr, 0.0f, 0, rows, rows, d_in, weight, memory);
  parallel_run(threads, [&](const Worker& worker) {
    if (!few) {
      const Range own = worker.share(rows);
      kernels<T>().tile(x, nullptr, 0.0f, own.begin, own.end, rows, d_in, weight, memory);
      worker.wait();
    }
    const Range share = worker.share(d_out, kUnit);
    step(TiledActivations{memory, rows, d_in}, share.begin, share.end);
  });
}

Tensor linear(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual_in) {
  const Tensor x = contiguous(x_in);
  const int64_t rows = x.size(0), d_in = x.size(1), d_out = weight.size(0);
  Tensor out = new_empty(x, {rows, d_out});
  std::optional<Tensor> residual;
  if (residual_in.has_value()) residual = contiguous(*residual_in);
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    LinearArgs<T> args{{},
                       matrix<T>(weight, "weight", {d_out, d_in}),
                       data<T>(bias, "bias", {d_out}),
                       data<T>(residual, "residual", {rows, d_out}),
                       static_cast<T*>(out.data_ptr()),
                       d_out,
                       nullptr};
    const T* from = data<T>(x, "x", {rows, d_in});
    share_rows(from, rows, d_in, d_out, args.weight, [&](TiledActivations tiled, int64_t begin, int64_t end) {
      LinearArgs<T> own = args;
      own.x = tiled;
      kernels<T>().linear(own, begin, end);
    });
  });
  return out;
}

Tensor swiglu(const Tensor& x_in, const Tensor& gate, const Tensor& up) {
  const Tensor x = contiguous(x_in);
  const int64_t rows = x.size(0), d_in = x.size(1), d_out = gate.size(0);
  Tensor out = new_empty(x, {rows, d_out});
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    const Weight gates = matrix<T>(gate, "gate", {d_out, d_in}), ups = matrix<T>(up, "up", {d_out, d_in});
    check_alike(gates, ups, "gate and up");
    const T* from = data<T>(x, "x", {rows, d_in});
    T* to = static_cast<T*>(out.data_ptr());
    share_rows(from, rows, d_in, d_out, gates, [&](TiledActivations tiled, int64_t begin, int64_t end) {
      kernels<T>().swiglu({tiled, gates, ups, to, d_out, nullptr}, begin, end);
    });
  });
  return out;
}

// The keys and values of one layer, with room for `rows` more rows of each of `batch` sequences.
struct LayerCache {
  const Tensor &k, &v;
  int64_t num_slots, num_kv_heads, capacity, head_dim;
  const int64_t *lengths, *slots;

  LayerCache(const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
             const std::optional<Tensor>& slots_in, int64_t batch, int64_t rows, int64_t head_dim)
      : k(k_cache),
        v(v_cache),
        num_slots(k_cache.size(0)),
        num_kv_heads(k_cache.size(1)),
        capacity(k_cache.size(2)),
        head_dim(head_dim),
        lengths(data<int64_t>(seq_lens, "seq_lens", {batch})),
        slots(data<int64_t>(slots_in, "slots", {batch})) {
    check_head_dim(head_dim);
    check_capacity(lengths, batch, rows, capacity);
    check_slots(slots, batch, num_slots);
  }
  template <class T>
  T* keys() const {
    return data<T>(k, "k_cache", {num_slots, num_kv_heads, capacity, head_dim});
  }
  template <class T>
  T* values() const {
    return data<T>(v, "v_cache", {num_slots, num_kv_heads, capacity, head_dim});
  }
};

Tensor rope_kv_append(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos, const Tensor& sin,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                      const std::optional<Tensor>& slots) {
  const Tensor q = contiguous(q_in), k = contiguous(k_in), v = contiguous(v_in);
  const int64_t batch = q.size(0), rows = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const LayerCache cache(k_cache, v_cache, seq_lens, slots, batch, rows, head_dim);
  const int64_t num_kv_heads = cache.num_kv_heads, positions = cos.size(0);
  LSK_REQUIRE(positions >= cache.capacity, "cos has ", positions, " positions, the cache's capacity is ",
              cache.capacity);
  Tensor out = torch::stable::empty_like(q);
  with_float_type(q.scalar_type(), [&]<class T>(T*) {
    const RopeStep<T> step{data<T>(q, "q", {batch, rows, num_heads, head_dim}),
                           data<T>(k, "k", {batch, rows, num_kv_heads, head_dim}),
                           data<T>(v, "v", {batch, rows, num_kv_heads, head_dim}),
                           nullptr,
                           nullptr,
                           data<float>(cos, "cos", {positions, head_dim / 2}),
                           data<float>(sin, "sin", {positions, head_dim / 2}),
                           static_cast<T*>(out.data_ptr()),
                           cache.keys<T>(),
                           cache.values<T>(),
                           cache.lengths,
                           cache.slots,
                           batch,
                           rows,
                           num_heads,
                           num_kv_heads,
                           cache.capacity,
                           head_dim,
                           0.0f};
    parallel_run(1, [&](const Worker& worker) { step.run(worker); });  // too little work for a second thread
  });
  return out;
}

Tensor verify_attention(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                        const std::optional<Tensor>& slots) {
  const Tensor q = contiguous(q_in);
  const int64_t batch = q.size(0), rows = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const LayerCache cache(k_cache, v_cache, seq_lens, slots, batch, rows, head_dim);
  check_num_heads(num_heads, cache.num_kv_heads);
  Tensor out = torch::stable::empty_like(q);
  if (out.numel() == 0) return out;
  with_float_type(q.scalar_type(), [&]<class T>(T*) {
    AttentionStep<T> step{data<T>(q, "q", {batch, rows, num_heads, head_dim}),
                          cache.keys<T>(),
                          cache.values<T>(),
                          cache.lengths,
                          cache.slots,
                          batch,
                          rows,
                          num_heads,
                          cache.num_kv_heads,
                          cache.capacity,
                          head_dim,
                          AttentionStep<T>::count_splits(cache.lengths, batch, rows),
                          nullptr};
    const int threads = num_threads();
    const int64_t partial = AttentionStep<T>::partial_size(step, step.splits, threads);
    Workspace workspace(Workspace::bytes<float>(partial));
    step.partial = workspace.take<float>(partial);
    parallel_run(threads, [&](const Worker& worker) {
      step.run(worker, worker.share(batch * rows * num_heads), static_cast<T*>(out.data_ptr()));
    });
  });
  return out;
}

void dequantize(const Tensor& weight, const Tensor& out) {
  const bool packed = weight.scalar_type() == ScalarType::Byte || weight.scalar_type() == ScalarType::Short;
  LSK_REQUIRE(packed && out.dim() == 2, "dequantize takes packed weights, and rank 2");
  const int64_t rows = out.size(0), width = out.size(1);
  with_float_type(out.scalar_type(), [&]<class T>(T*) {
    const Weight from = matrix<T>(weight, "weight", {rows, width});
    T* to = data<T>(out, "out", {rows, width});
    parallel_run(num_threads(), [&](const Worker& worker) {
      const Range share = worker.share(rows, kUnit);
      for (int64_t n = share.begin; n < share.end; ++n) kernels<T>().expand_row(from, n, width, to + n * width);
    });
  });
}

// Copies units of sixteen rows, `pitch` bytes apart: the first unit of each row, then the second of each.
template <class Unit>
uint8_t* interleave_units(const uint8_t* rows, int64_t pitch, int64_t units, Unit flip, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t lane = 0; lane < kPanelRows; ++lane, to += sizeof(Unit)) {
      Unit unit;
      std::memcpy(&unit, rows + lane * pitch + u * static_cast<int64_t>(sizeof(Unit)), sizeof(Unit));
      unit ^= flip;
      std::memcpy(to, &unit, sizeof(Unit));
    }
  }
  return to;
}

void interleave(const Tensor& weight, int64_t groups, int64_t header, bool eight_bits, const Tensor& out) {
  LSK_REQUIRE(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == ScalarType::Byte,
              "interleave takes packed weights of rank 2");
  const int64_t rows = weight.size(0), pitch = weight.size(1);
  LSK_REQUIRE(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Short && out.size(0) == rows &&
                  2 * out.size(1) == pitch,
              "out must be int16, with the bytes of the weight");
  LSK_REQUIRE(groups > 0 && pitch % groups == 0 && rows % kPanelRows == 0, "groups must divide a row, and 16 the rows");
  const int64_t group_bytes = pitch / groups, units = (group_bytes - header) / 4;
  LSK_REQUIRE(header >= 0 && header % 2 == 0 && units >= 0 && header + 4 * units == group_bytes,
              "a group is a header of fp16 numbers and columns of four bytes");
  const auto* from = static_cast<const uint8_t*>(weight.data_ptr());
  auto* to = static_cast<uint8_t*>(out.data_ptr());
  const uint32_t flip = eight_bits ? 0x80808080u : 0u;  // int8 becomes unsigned, greater by 128
  parallel_run(num_threads(), [&](const Worker& worker) {
    const Range share = worker.share(rows, kPanelRows);
    for (int64_t n = share.begin; n < share.end; n += kPanelRows) {
      const uint8_t* panel = from + n * pitch;
      uint8_t* next = to + n * pitch;
      for (int64_t g = 0; g < groups; ++g)
        next = interleave_units<uint16_t>(panel + g * group_bytes, pitch, header / 2, 0, next);
      for (int64_t g = 0; g < groups; ++g)
        next = interleave_units<uint32_t>(panel + g * group_bytes + header, pitch, units, flip, next);
    }
  });
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&lsk::rms_norm));
  m.impl("linear", TORCH_BOX(&lsk::linear));
  m.impl("swiglu", TORCH_BOX(&lsk::swiglu));
  m.impl("rope_kv_append", TORCH_BOX(&lsk::rope_kv_append));
  m.impl("verify_attention", TORCH_BOX(&lsk::verify_attention));
  m.impl("dequantize", TORCH_BOX(&lsk::dequantize));
  m.impl("interleave", TORCH_BOX(&lsk::interleave));
}
