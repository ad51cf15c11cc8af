// Stands in for libtorch_cuda.so when the CUDA library is linked, so that building it takes no CUDA build of torch. It
// is never shipped and never loaded: the library is loaded beside a CUDA torch only, which brings the real one.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }
