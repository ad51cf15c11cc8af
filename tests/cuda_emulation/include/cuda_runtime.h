// Stands in for the CUDA runtime's header of this name.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cuda_emulation/emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local  // of the one operating system thread that runs all fibers: shared by them
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// What the compiler must not instrument: the stand-in's own accesses on behalf of device code.
#define EMU_PLAIN __attribute__((no_sanitize("thread"), noinline)) inline

using emu::dim3;
using emu::uint3;
constexpr int warpSize = 32;

using std::max;
using std::min;

#include "cuda_emulation/host_api.h"
#include "cuda_emulation/vectors.h"
#include "cuda_emulation/warp.h"
#include "cuda_emulation/math.h"
