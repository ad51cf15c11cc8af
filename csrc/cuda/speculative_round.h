// speculative_round: draft, verify and accept as one chain of launches, without host synchronization.
#pragma once

#include "cuda/accept.h"
#include "cuda/draft.h"

namespace lsk {

// B sequences, K draft tokens, M = K + 1 rows each to verify.
template <class T>
struct RoundArgs {
  DraftArgs<T> draft;      // `extend` is true
  Layers<T> shallow;       // [0, E), for one row
  Layers<T> draft_layers;  // for one row, on the scratch of `shallow`
  Layers<T> deep;          // [E, L), for M rows
  Head<T> draft_head, head;
  ArgmaxLse* partial;  // scratch [B M, head_tiles]
  int64_t* target;     // scratch [B M]: each row's token
  float* scores;       // scratch [2, B M]
  int64_t* seq_lens;
  int64_t *accepted, *next_token;  // [B]
  AcceptSampledArgs sampled;       // with a temperature; its logits are scratch
};

// Verifies all rows: layers [E, L), then the full head. Overwrites draft.states.
template <class T>
cudaError_t verify(Chain& chain, const RoundArgs<T>& a) {
  const int64_t rows = a.draft.batch * a.draft.rows(), hidden_size = a.draft.hidden_size;
  const bool sampled = a.sampled.temperature != nullptr;
  const Rows<T> states{a.draft.states, hidden_size};
  const Rows<const T> seen{states.data, hidden_size};
  const HeadLogits logits{const_cast<float*>(a.sampled.target_logits), a.head.vocab_size};
  LSK_RETURN_IF_ERROR(a.deep.run(chain, seen, states, 0));
  LSK_RETURN_IF_ERROR(exit_head_tiles(chain, a.head, seen, rows, {}, sampled ? logits : HeadLogits{}, a.partial));
  if (sampled) return cudaSuccess;
  return exit_head_merge(chain, a.partial, rows, a.head.vocab_size, nullptr, a.target, a.scores, a.scores + rows);
}

template <class T>
cudaError_t speculative_round(Chain& chain, const RoundArgs<T>& a) {
  if (a.draft.batch == 0) return cudaSuccess;
  const int64_t num_speculations = a.draft.num_speculations, draft_vocab_size = a.draft_head.vocab_size;
  HeadLogits logits;
  if (a.sampled.temperature != nullptr)
    logits = {const_cast<float*>(a.sampled.draft_logits), num_speculations * draft_vocab_size};
  LSK_RETURN_IF_ERROR(clear_tickets(chain, a.shallow.scratch.attention, a.shallow.scratch.attention_memory()));
  LSK_RETURN_IF_ERROR(clear_tickets(chain, a.deep.scratch.attention, a.deep.scratch.attention_memory()));
  LSK_RETURN_IF_ERROR(draft(chain, a.draft, a.shallow, a.draft_layers, a.draft_head,
                            {a.sampled.temperature, a.sampled.seed}, logits, draft_vocab_size));
  LSK_RETURN_IF_ERROR(verify(chain, a));
  if (a.sampled.temperature != nullptr) return accept_sampled(chain, a.sampled);
  return accept_greedy(chain, a.draft.tokens, a.target, a.seq_lens, a.accepted, a.next_token, a.draft.batch,
                       num_speculations);
}

}  // namespace lsk
