#include "cuda/accept.cu"

#include "cuda_emulation/entry.h"

using namespace lsk;

EMULATED(accept_sampled)(const int64_t* draft, const float* draft_logits, const float* target_logits, int64_t* seq_lens,
                         const float* temperature, const int64_t* seed, const int64_t* token_map, int64_t* accepted,
                         int64_t* next_token, void* rows, void* candidates, int* inverse, int64_t batch,
                         int64_t num_speculations, int64_t draft_vocab_size, int64_t vocab_size) {
  Chain chain(nullptr);
  return accept_sampled(
      chain, {draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map, accepted, next_token, batch,
              num_speculations, draft_vocab_size, vocab_size, static_cast<ArgmaxLse*>(rows),
              static_cast<SampleCandidates*>(candidates), inverse, accept_tiles(vocab_size, draft_vocab_size)});
}

EMULATED(accept_greedy)(const int64_t* draft, const int64_t* target, int64_t* seq_lens, int64_t* accepted,
                        int64_t* next_token, int64_t batch, int64_t num_speculations) {
  Chain chain(nullptr);
  return accept_greedy(chain, draft, target, seq_lens, accepted, next_token, batch, num_speculations);
}
