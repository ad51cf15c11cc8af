// The kernels of accept_sampled.
#include "cuda/accept_sampled.cuh"
