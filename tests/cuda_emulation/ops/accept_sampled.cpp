#include "cuda/accept_sampled.cuh"

#include "cuda_emulation/entry.h"

using namespace lsk;

EMULATED(accept_sampled)(const int64_t* draft, const float* draft_logits, const float* target_logits, int64_t* seq_lens,
                         const float* temperature, const int64_t* seed, const int64_t* token_map, int64_t* accepted,
                         int64_t* next_token, void* rows, void* picks, int* inverse, int64_t batch, int64_t drafted,
                         int64_t draft_vocab_size, int64_t vocab_size) {
  Chain chain(nullptr);
  return accept_sampled(chain, {draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map, accepted,
                                next_token, batch, drafted, draft_vocab_size, vocab_size, static_cast<Choice*>(rows),
                                static_cast<Pick*>(picks), inverse, accept_stretches(vocab_size, draft_vocab_size)});
}
