// draft: its arguments and what launches it, compiled in draft.cu.
#pragma once

#include "cuda/exit_head.h"
#include "cuda/partial_forward.h"

namespace lsk {

template <class T>
struct DraftArgs {
  const int64_t* token;  // [B]
  Weight embedding;      // [Ve, D]
  int64_t batch, vocab_size, hidden_size, num_speculations;
  bool extend;
  float draft_threshold;  // a draft less probable ends its sequence's drafts
  int64_t* tokens;        // [B, K]
  T* states;              // [B, K + extend, D]
  float* probability;     // [B, K]
  T* hidden;              // scratch [B, D]: a token's embedding, then what the exit blocks make of its state
  Choice* partial;        // scratch [B, head_tiles]

  __host__ __device__ int64_t rows() const { return num_speculations + (extend ? 1 : 0); }
  __host__ __device__ Rows<T> state(int64_t row) const { return {states + row * hidden_size, rows() * hidden_size}; }
};

// `count` layers, how they run on one row of each sequence (`args` less its in, out and ahead), and their scratch.
template <class T>
struct Layers {
  const LayerWeights<T>* weights;
  int64_t count;
  ForwardArgs<T> args;
  ForwardScratch<T> scratch;  // its tickets zero

  cudaError_t run(Chain& chain, Rows<const T> in, Rows<T> out, int64_t ahead) const {
    ForwardArgs<T> all = args;
    all.in = in, all.out = out, all.ahead = ahead;
    return forward(chain, all, weights, count, scratch);
  }
};

// `blocks`, which may be none, run on one row, too, and may share the scratch of `layers`. `sampling` is given
// positions by the layers' seq_lens. The logits of step i, where they are wanted, are `logits` moved on by i *
// step_pitch.
template <class T>
cudaError_t draft(Chain& chain, const DraftArgs<T>& args, const Layers<T>& layers, const Layers<T>& blocks,
                  const Head<T>& head, HeadSampling sampling, HeadLogits logits, int64_t step_pitch);

}  // namespace lsk
