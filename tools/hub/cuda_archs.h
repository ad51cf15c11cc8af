// What the CUDA kernels are compiled for, which `_extension.py` asks: the capabilities of build.toml, less those that the
// toolkit does not know.
#pragma once

#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
#define LSK_CUDA_ARCHS "80;90;100;compute_100"
#else
#define LSK_CUDA_ARCHS "80;90"
#endif
