// Helpers of the CUDA ops: device guard and stream, launch errors, device dtypes, size checks. Compiles with any torch,
// CUDA build or not: the one symbol of libtorch_cuda that it needs is declared here and resolved at load time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <type_traits>

#include "common/checks.h"
#include "cuda/common.h"

#ifndef USE_CUDA  // otherwise torch's header declares it
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace lsk {

// Makes the device of a tensor current for a scope, and holds torch's current stream on it:
//
//   const DeviceScope scope(x, {&weight});
//   Chain chain(scope.stream());
//   check_launch("rms_norm", rms_norm<T>(chain, ..., rows, width, ...));
class DeviceScope {
 public:
  // All `others` must be on the device of `first`.
  explicit DeviceScope(const Tensor& first, std::initializer_list<const Tensor*> others = {})
      : index_(first.get_device_index()), guard_(index_) {
    LSK_REQUIRE(first.is_cuda(), "expected tensors on a CUDA device");
    for (const Tensor* other : others) {
      LSK_REQUIRE(other->is_cuda() && other->get_device_index() == index_, "expected all tensors on cuda:", index_);
    }
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == 0, "cuda:", index_,
                    " has no current stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Throws if a launch failed. Does not synchronize: errors inside a kernel show up at a later launch.
inline void check_launch(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(status), " (CUDA error ",
                  static_cast<int>(status), ")");
}

// Optional tensors must be on the device of `first`, too.
inline void check_device(const Tensor& first, std::initializer_list<const std::optional<Tensor>*> others) {
  for (const std::optional<Tensor>* other : others) {
    LSK_REQUIRE(
        !other->has_value() || ((*other)->is_cuda() && (*other)->get_device_index() == first.get_device_index()),
        "expected all tensors on cuda:", first.get_device_index());
  }
}

template <>
constexpr ScalarType scalar_type<__nv_bfloat16>() {
  return ScalarType::BFloat16;
}
template <>
constexpr ScalarType scalar_type<__half>() {
  return ScalarType::Half;
}

// Calls f with a null pointer of the device type that `dtype` names.
template <class F>
auto with_device_type(ScalarType dtype, F f) {
  return with_float_type(dtype, [&]<class T>(T*) {
    if constexpr (std::is_same_v<T, bf16>) {
      return f(static_cast<__nv_bfloat16*>(nullptr));
    } else if constexpr (std::is_same_v<T, f16>) {
      return f(static_cast<__half*>(nullptr));
    } else {
      return f(static_cast<T*>(nullptr));
    }
  });
}

// The kernels use 32-bit integers for columns, matrix rows and positions, and round them up to tiles.
inline void check_sizes(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMax = int64_t{1} << 30;
  for (int64_t size : sizes) LSK_REQUIRE(size <= kMax, "a size of ", size, " is above ", kMax);
}

// Attention uses one grid row per sequence and key/value head.
inline void check_planes(int64_t batch, int64_t num_kv_heads) {
  constexpr int64_t kMax = 65535;
  LSK_REQUIRE(product(batch, num_kv_heads) <= kMax, batch, " sequences of ", num_kv_heads,
              " key/value heads are more than ", kMax);
}

// The partial results of attention must have a size, and so must those of one layer.
inline void check_attention(int64_t batch, int64_t num_heads, int64_t capacity, int64_t head_dim) {
  check_sizes({batch, capacity, product(num_heads, head_dim)});
  product(batch, num_heads, capacity, head_dim + 2, sizeof(float));
}

// Uninitialized bytes on the device of `like`.
inline Tensor scratch_bytes(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

using torch::stable::contiguous;

inline bool begins_aligned(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % 16 == 0; }

// Makes rows contiguous and, for packed weights, aligned.
inline Tensor rows_for(const Tensor& x, bool packed) {
  const Tensor out = contiguous(x);
  return packed && !begins_aligned(out.data_ptr()) ? torch::stable::clone(out) : out;
}

inline bool is_packed(const Tensor& weight) { return weight.scalar_type() == ScalarType::Byte; }

// Packed weights are copied in units of 16 bytes.
inline void check_packed(const Weight& weight, const char* name) {
  if (weight.format <= Format::kRows) return;
  LSK_REQUIRE(!weight.panels, name,
              " is interleaved for a CPU: call layerskip.scatter_weights before a model is moved to a GPU");
  LSK_REQUIRE(begins_aligned(weight.data), name, ": packed weights must begin at a multiple of 16 bytes");
  check_sizes({weight.pitch});
}

// As matrix(), and checks what the CUDA kernels need.
template <class T>
Weight device_matrix(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  const Weight out = matrix<T>(tensor, name, sizes);
  check_packed(out, name);
  return out;
}

// The cache of one layer, [S, G, T, C] twice, for `rows` rows of each of `batch` sequences.
template <class T>
Cache<T> cache_of(const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                  const std::optional<Tensor>& slots, int64_t batch, int64_t rows, int64_t head_dim) {
  const int64_t num_slots = k_cache.size(0), num_kv_heads = k_cache.size(1), capacity = k_cache.size(2);
  check_sizes({batch, rows, num_kv_heads, capacity});
  LSK_REQUIRE(slots.has_value() || num_slots == batch, "the cache has ", num_slots, " rows for ", batch,
              " sequences, and no slots are given");
  LSK_REQUIRE(rows <= capacity, rows, " rows do not fit a cache of capacity ", capacity);
  Cache<T> cache;
  cache.k = data<T>(k_cache, "k_cache", {num_slots, num_kv_heads, capacity, head_dim});
  cache.v = data<T>(v_cache, "v_cache", {num_slots, num_kv_heads, capacity, head_dim});
  cache.seq_lens = data<int64_t>(seq_lens, "seq_lens", {batch});
  cache.slots = data<int64_t>(slots, "slots", {batch});
  cache.batch = static_cast<int>(batch), cache.rows = static_cast<int>(rows);
  cache.num_kv_heads = static_cast<int>(num_kv_heads), cache.capacity = static_cast<int>(capacity);
  cache.head_dim = static_cast<int>(head_dim), cache.num_slots = num_slots;
  return cache;
}

}  // namespace lsk
