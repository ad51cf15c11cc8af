#include "cuda/exit_head.cu"

#include "cuda_emulation/entry.h"
#include "cuda_emulation/weights.h"

using namespace lsk;

namespace {

template <class T>
cudaError_t run(const void* hidden, int64_t pitch, const void* norm, const void* weight, int64_t format, float eps,
                const int64_t* token_map, const float* scale, HeadSampling sampling, HeadLogits logits, void* partial,
                int64_t* token, float* logit, float* logsumexp, int64_t rows, int64_t vocab_size, int64_t hidden_size) {
  const Head<T> head{static_cast<const T*>(norm),
                     emu::weight<T>(weight, hidden_size, format),
                     scale,
                     token_map,
                     vocab_size,
                     hidden_size,
                     eps};
  Chain chain(nullptr);
  ArgmaxLse* partials = static_cast<ArgmaxLse*>(partial);
  const Rows<const T> states{static_cast<const T*>(hidden), pitch};
  LSK_RETURN_IF_ERROR(exit_head_tiles(chain, head, states, rows, sampling, logits, partials));
  return exit_head_merge(chain, partials, rows, vocab_size, token_map, token, logit, logsumexp);
}

}  // namespace

EMULATED(exit_head)(const void* hidden, int64_t pitch, const void* norm, const void* weight, float eps,
                    const int64_t* token_map, const float* scale, const float* temperature, const int64_t* seed,
                    const int64_t* offset, float* logits, int64_t logits_pitch, void* partial, int64_t* token,
                    float* logit, float* logsumexp, int64_t rows, int64_t vocab_size, int64_t hidden_size,
                    int64_t format, int64_t dtype) {
  const HeadSampling sampling{temperature, seed, offset};
  const HeadLogits wanted{logits, logits_pitch};
  return emu::with_float_type(dtype, [&]<class T>(T*) {
    return run<T>(hidden, pitch, norm, weight, format, eps, token_map, scale, sampling, wanted, partial, token, logit,
                  logsumexp, rows, vocab_size, hidden_size);
  });
}
