// Arguments and scratch of accept_sampled from tensors: for the op and for speculative_round.
#pragma once

#include "cuda/accept.h"
#include "cuda/ops/tensors.h"

namespace lsk {

class AcceptSampledScratch {
 public:
  // For draft tokens [B, K] of a head with `draft_vocab_size` rows, verified by one with `vocab_size`.
  AcceptSampledScratch(const Tensor& draft, int64_t draft_vocab_size, int64_t vocab_size, bool mapped)
      : draft_vocab_size_(checked(draft, draft_vocab_size, vocab_size, mapped)),
        vocab_size_(vocab_size),
        tiles_(accept_tiles(vocab_size, draft_vocab_size)),
        rows_(scratch_bytes(draft, product(draft.size(0), 2 * draft.size(1) + 1, tiles_, sizeof(ArgmaxLse)))),
        candidates_(scratch_bytes(draft, product(draft.size(0), tiles_, sizeof(SampleCandidates)))),
        inverse_(scratch_bytes(draft, mapped ? product(vocab_size, sizeof(int)) : 0)),
        mapped_(mapped) {}

  AcceptSampledArgs args(const Tensor& draft, const Tensor& draft_logits, const Tensor& target_logits,
                         const Tensor& seq_lens, const Tensor& temperature, const Tensor& seed,
                         const std::optional<Tensor>& token_map, Tensor& accepted, Tensor& next_token) const {
    const int64_t batch = draft.size(0), num_speculations = draft.size(1);
    return {data<int64_t>(draft, "draft", {batch, num_speculations}),
            data<float>(draft_logits, "draft_logits", {batch, num_speculations, draft_vocab_size_}),
            data<float>(target_logits, "target_logits", {batch, num_speculations + 1, vocab_size_}),
            data<int64_t>(seq_lens, "seq_lens", {batch}),
            data<float>(temperature, "temperature", {batch}),
            data<int64_t>(seed, "seed", {batch}),
            data<int64_t>(token_map, "token_map", {draft_vocab_size_}),
            static_cast<int64_t*>(accepted.data_ptr()),
            static_cast<int64_t*>(next_token.data_ptr()),
            batch,
            num_speculations,
            draft_vocab_size_,
            vocab_size_,
            static_cast<ArgmaxLse*>(rows_.data_ptr()),
            static_cast<SampleCandidates*>(candidates_.data_ptr()),
            mapped_ ? static_cast<int*>(inverse_.data_ptr()) : nullptr,
            tiles_};
  }

 private:
  static int64_t checked(const Tensor& draft, int64_t draft_vocab_size, int64_t vocab_size, bool mapped) {
    constexpr int64_t kMax = 65535;  // of a grid's second and third dimension: 2 K + 1 rows, B sequences
    LSK_REQUIRE(draft.size(0) <= kMax, "a batch of ", draft.size(0), " is above ", kMax);
    LSK_REQUIRE(draft.size(1) <= kMax / 2, draft.size(1), " draft tokens are more than ", kMax / 2);
    LSK_REQUIRE(draft_vocab_size > 0 && vocab_size > 0, "a head has no rows");
    LSK_REQUIRE(mapped || draft_vocab_size == vocab_size, "a draft's head of ", draft_vocab_size, " rows for ",
                vocab_size, " tokens needs a token_map");
    check_sizes({draft_vocab_size, vocab_size});
    return draft_vocab_size;
  }

  int64_t draft_vocab_size_, vocab_size_;
  int tiles_;
  Tensor rows_, candidates_, inverse_;
  bool mapped_;
};

}  // namespace lsk
