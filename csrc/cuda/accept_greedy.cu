// The kernels of accept_greedy.
#include "cuda/accept_greedy.cuh"
