// Replaces libtorch_cuda.so at link time, so that building the CUDA library does not need a CUDA build of torch. It is
// neither shipped nor loaded: the library is only loaded with a CUDA torch, which has the real one.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }
