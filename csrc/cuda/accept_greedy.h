// accept_greedy: what launches it, compiled in accept_greedy.cu.
#pragma once

#include "cuda/common.h"

namespace lsk {

// All [B] but draft [B, K] and target [B, K + 1].
cudaError_t accept_greedy(Chain& chain, const int64_t* draft, const int64_t* target, int64_t* seq_lens,
                          int64_t* accepted, int64_t* next_token, int64_t batch, int64_t drafted);

}  // namespace lsk
