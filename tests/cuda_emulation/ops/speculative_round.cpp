// draft and speculative_round, with the layers that they run.
#include <vector>

#include "cuda/accept.cu"
#include "cuda/verify_attention.cu"
#include "cuda/draft.cu"
#include "cuda/exit_head.cu"
#include "cuda/partial_forward.cu"
#include "cuda/linear.cu"
#include "cuda/rms_norm.cu"
#include "cuda/rope_kv_append.cu"
#include "cuda/speculative_round.h"

#include "cuda_emulation/entry.h"
#include "cuda_emulation/layers.h"

using namespace lsk;

namespace {

// In the order in which runners.py gives them.
struct Sizes {
  int64_t batch, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, capacity, num_slots,
      num_speculations, extend, embedded, draft_vocab_size, vocab_size, exit_layer, layers,
      num_draft_layers,                                  // `layers`: without the draft layers
      embedding_format, draft_head_format, head_format;  // codes of lsk::Format

  ForwardShape shape(int64_t rows) const {
    return {batch, rows, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, capacity, num_slots};
  }
};

// What all layers share.
struct Model {
  const float *cos, *sin;
  const int64_t *seq_lens, *slots;
  float eps;

  template <class T>
  Layers<T> run(const std::vector<LayerWeights<T>>& layers, const ForwardShape& shape, void* memory) const {
    ForwardArgs<T> args{};
    args.shape = shape, args.angles = {cos, sin}, args.seq_lens = seq_lens, args.slots = slots, args.eps = eps;
    return {layers.data(), static_cast<int64_t>(layers.size()), args, ForwardScratch<T>(shape, memory)};
  }
};

struct DraftBuffers {
  const int64_t* token;
  const void* embedding;
  float draft_threshold;
  int64_t* tokens;
  void* states;
  float* probability;
  void *hidden, *partial;

  template <class T>
  DraftArgs<T> args(const Sizes& s) const {
    return {token,
            emu::weight<T>(embedding, s.hidden_size, s.embedding_format),
            s.batch,
            s.embedded,
            s.hidden_size,
            s.num_speculations,
            s.extend != 0,
            draft_threshold,
            tokens,
            static_cast<T*>(states),
            probability,
            static_cast<T*>(hidden),
            static_cast<ArgmaxLse*>(partial)};
  }
};

}  // namespace

EMULATED(forward_bytes)(int64_t* bytes, const Sizes* sizes, int64_t rows, int64_t dtype) {
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    *bytes = ForwardScratch<T>::bytes(sizes->shape(rows));
    return cudaSuccess;
  });
}

EMULATED(draft)(const int64_t* token, const void* embedding, void** weights, const int64_t* formats, void** caches,
                const float* cos, const float* sin, const int64_t* seq_lens, const int64_t* slots, const void* norm,
                const void* head, const int64_t* token_map, const float* scale, const float* temperature,
                const int64_t* seed, float* logits, int64_t logits_pitch, int64_t step_pitch, int64_t* tokens,
                void* states, float* probability, void* hidden, void* partial, void* memory, const Sizes* sizes,
                float eps, float draft_threshold, int64_t dtype) {
  const Sizes& s = *sizes;
  const Model model{cos, sin, seq_lens, slots, eps};
  const DraftBuffers buffers{token, embedding, draft_threshold, tokens, states, probability, hidden, partial};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    const auto layers = emu::layers<T>(weights, formats, caches, 0, s.exit_layer, s.shape(1)),
               draft_layers = emu::layers<T>(weights, formats, caches, s.exit_layer, s.exit_layer + s.num_draft_layers,
                                             s.shape(1));
    const Layers<T> shallow = model.run<T>(layers, s.shape(1), memory);
    const Head<T> exit{static_cast<const T*>(norm),
                       emu::weight<T>(head, s.hidden_size, s.draft_head_format),
                       scale,
                       token_map,
                       s.draft_vocab_size,
                       s.hidden_size,
                       eps};
    Chain chain(nullptr);
    LSK_RETURN_IF_ERROR(clear_tickets(chain, shallow.scratch.attention, memory));
    return draft(chain, buffers.args<T>(s), shallow, model.run<T>(draft_layers, s.shape(1), memory), exit,
                 {temperature, seed}, {logits, logits_pitch}, step_pitch);
  });
}

EMULATED(speculative_round)(const int64_t* token, const void* embedding, void** weights, const int64_t* formats,
                            void** caches, const float* cos, const float* sin, int64_t* seq_lens, const int64_t* slots,
                            const void* norm, const void* head, const void* draft_norm, const void* draft_head,
                            const int64_t* token_map, const float* scale, const float* temperature, const int64_t* seed,
                            float* draft_logits, float* target_logits, int64_t* tokens, void* states,
                            float* probability, void* hidden, void* partial, void* memory, void* deep_memory,
                            int64_t* target, float* scores, int64_t* accepted, int64_t* next_token, void* rows,
                            void* candidates, int* inverse, const Sizes* sizes, float eps, float draft_threshold,
                            int64_t dtype) {
  const Sizes& s = *sizes;
  const Model model{cos, sin, seq_lens, slots, eps};
  const DraftBuffers buffers{token, embedding, draft_threshold, tokens, states, probability, hidden, partial};
  const AcceptSampledArgs sampled{tokens,
                                  draft_logits,
                                  target_logits,
                                  seq_lens,
                                  temperature,
                                  seed,
                                  token_map,
                                  accepted,
                                  next_token,
                                  s.batch,
                                  s.num_speculations,
                                  s.draft_vocab_size,
                                  s.vocab_size,
                                  static_cast<ArgmaxLse*>(rows),
                                  static_cast<SampleCandidates*>(candidates),
                                  inverse,
                                  accept_tiles(s.vocab_size, s.draft_vocab_size)};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    const auto shallow = emu::layers<T>(weights, formats, caches, 0, s.exit_layer, s.shape(1)),
               deep = emu::layers<T>(weights, formats, caches, s.exit_layer, s.layers, s.shape(1)),
               draft_layers =
                   emu::layers<T>(weights, formats, caches, s.layers, s.layers + s.num_draft_layers, s.shape(1));
    const T *full_norm = static_cast<const T*>(norm), *exit_norm = static_cast<const T*>(draft_norm);
    const RoundArgs<T> args{buffers.args<T>(s),
                            model.run<T>(shallow, s.shape(1), memory),
                            model.run<T>(draft_layers, s.shape(1), memory),
                            model.run<T>(deep, s.shape(s.num_speculations + 1), deep_memory),
                            {exit_norm, emu::weight<T>(draft_head, s.hidden_size, s.draft_head_format), scale,
                             token_map, s.draft_vocab_size, s.hidden_size, eps},
                            {full_norm, emu::weight<T>(head, s.hidden_size, s.head_format), nullptr, nullptr,
                             s.vocab_size, s.hidden_size, eps},
                            static_cast<ArgmaxLse*>(partial),
                            target,
                            scores,
                            seq_lens,
                            accepted,
                            next_token,
                            sampled};
    Chain chain(nullptr);
    return speculative_round(chain, args);
  });
}
