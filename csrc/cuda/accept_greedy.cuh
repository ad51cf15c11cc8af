// accept_greedy: the leading drafts that the target agrees with.
#pragma once

#include "cuda/accept_greedy.h"
#include "cuda/ptx.cuh"

namespace lsk {

// One thread a sequence.
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    accept_greedy_kernel(const int64_t* draft, const int64_t* target, int64_t* seq_lens, int64_t* accepted,
                         int64_t* next_token, int64_t batch, int64_t drafted) {
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (b >= batch) return;
  const int64_t *own = draft + b * drafted, *wanted = target + b * (drafted + 1);
  int64_t count = 0;
  while (count < drafted && own[count] >= 0 && own[count] == wanted[count]) ++count;
  accepted[b] = count;
  next_token[b] = wanted[count];
  seq_lens[b] += count + 1;
}

cudaError_t accept_greedy(Chain& chain, const int64_t* draft, const int64_t* target, int64_t* seq_lens,
                          int64_t* accepted, int64_t* next_token, int64_t batch, int64_t drafted) {
  constexpr int kBlock = 128;
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(batch, kBlock)));
  return launch(chain.next(grid, kBlock), accept_greedy_kernel<kBlock>, draft, target, seq_lens, accepted, next_token,
                batch, drafted);
}

}  // namespace lsk
