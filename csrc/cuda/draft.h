// draft: arguments and launcher, compiled in draft.cu.
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
  float draft_threshold;  // a less probable token ends the drafts of its sequence
  int64_t* tokens;        // [B, K]
  T* states;              // [B, K + extend, D]
  float* probability;     // [B, K]
  T* hidden;              // scratch [B, D]: embedding of a token, then the output of the draft layers
  ArgmaxLse* partial;     // scratch [B, head_tiles]

  __host__ __device__ int64_t rows() const { return num_speculations + (extend ? 1 : 0); }
  __host__ __device__ Rows<T> state(int64_t row) const { return {states + row * hidden_size, rows() * hidden_size}; }
};

// Some layers, their arguments (without in, out and ahead) and their scratch.
template <class T>
struct Layers {
  const LayerWeights<T>* weights;
  int64_t num_layers;
  ForwardArgs<T> args;
  ForwardScratch<T> scratch;  // its tickets are zero

  cudaError_t run(Chain& chain, Rows<const T> in, Rows<T> out, int64_t ahead) const {
    ForwardArgs<T> all = args;
    all.in = in, all.out = out, all.ahead = ahead;
    return forward(chain, all, weights, num_layers, scratch);
  }
};

// `draft_layers` may be empty, and may share the scratch of `layers`; both run on one row of each sequence. The
// positions of `sampling` are set to the layers' seq_lens. Writes the logits of step i to logits.data + i * step_pitch,
// if given.
template <class T>
cudaError_t draft(Chain& chain, const DraftArgs<T>& args, const Layers<T>& layers, const Layers<T>& draft_layers,
                  const Head<T>& head, HeadSampling sampling, HeadLogits logits, int64_t step_pitch);

}  // namespace lsk
