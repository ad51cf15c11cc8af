// What the files in ops/ share: the tensors' device, its current stream, and errors. Compiles against any
// torch, CUDA build or not; the one symbol of libtorch_cuda that is needed is declared here and found when the library
// is loaded.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "common/checks.h"

#ifndef USE_CUDA  // with it, the header of torch declares the same
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace lsk {

// Makes the device of a tensor current for a scope and knows torch's current stream on it:
//
//   const DeviceScope scope(x, {&weight});
//   Chain chain(scope.stream());
//   check_launch("rms_norm", rms_norm<T>(chain, ..., rows, width, ...));
class DeviceScope {
 public:
  // All `others` must lie on the device of `first`.
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

// Raises when a launch failed. Costs no synchronisation: what a kernel does wrong later shows at the next one.
inline void check_launch(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(status), " (CUDA error ",
                  static_cast<int>(status), ")");
}

}  // namespace lsk
