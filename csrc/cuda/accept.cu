// The kernels of accept_greedy and accept_sampled.
#include "cuda/accept.cuh"
