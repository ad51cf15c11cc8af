#include "cuda/accept_greedy.cuh"

#include "cuda_emulation/entry.h"

using namespace lsk;

EMULATED(accept_greedy)(const int64_t* draft, const int64_t* target, int64_t* seq_lens, int64_t* accepted,
                        int64_t* next_token, int64_t batch, int64_t drafted) {
  Chain chain(nullptr);
  return accept_greedy(chain, draft, target, seq_lens, accepted, next_token, batch, drafted);
}
