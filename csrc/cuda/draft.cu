// draft: embed, layers [0, E), draft layers, exit head, K times; with `extend` once more without the head, for the keys
// and values of the last draft token. Tokens stay on the device: the kernel that merges the head's tiles also embeds
// the next token.
#include "cuda/argmax_lse.cuh"
#include "cuda/common.cuh"
#include "cuda/draft.h"
#include "cuda/packed.cuh"

namespace lsk {

// Whether sequence b still drafts in `step`; always true without a threshold.
template <class T>
__device__ __forceinline__ bool is_alive(const DraftArgs<T>& a, int64_t b, int64_t step) {
  return a.draft_threshold == 0 || step == 0 || a.tokens[b * a.num_speculations + step - 1] >= 0;
}

// Copies a row of a plain embedding, or zeros if `from` is null; by a whole block.
template <class T>
__device__ __forceinline__ void copy_row(const DraftArgs<T>& a, T* to, const T* from) {
  const int hidden_size = static_cast<int>(a.hidden_size), filled = from == nullptr ? 0 : hidden_size;
  const bool aligned = hidden_size * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(a.embedding.data) % 16 == 0;
  for (int column = threadIdx.x * kChunk<T>; column < hidden_size; column += blockDim.x * kChunk<T>)
    store_chunk(to, column, hidden_size, aligned, load_chunk(from, column, filled, aligned));
}

// Dequantizes row `row` of a packed embedding, rounded once; by a whole block.
template <class T, class W>
__device__ __forceinline__ void expand_row(const DraftArgs<T>& a, const PackedMatrix& packed, int64_t row, T* to) {
  const int hidden_size = static_cast<int>(a.hidden_size);
  for (int column = threadIdx.x; column < hidden_size; column += blockDim.x)
    to[column] = from_float<T>(weight_in<W>(packed, packed.row(row), column));
}

// A token outside of the embedding, such as -1, is embedded as token 0: later steps of its sequence are ignored.
template <class T>
__device__ __forceinline__ void embed(const DraftArgs<T>& a, const PackedMatrix& packed, int64_t b, int64_t token) {
  const int64_t row = token < 0 || token >= a.vocab_size ? 0 : token;
  T* to = a.hidden + b * a.hidden_size;
  switch (a.embedding.format) {
    case Format::kPlain:
      return copy_row(a, to, reinterpret_cast<const T*>(a.embedding.data + row * a.embedding.pitch));
    case Format::kInt8:
    case Format::kInt8Of128:
      return expand_row<T, Int8>(a, packed, row, to);
    case Format::kFp8:
    case Format::kFp8Of128:
      return expand_row<T, Fp8>(a, packed, row, to);
    default:
      return expand_row<T, Int4>(a, packed, row, to);
  }
}

// One block per sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) draft_embed_kernel(DraftArgs<T> a, PackedMatrix packed) {
  ptx::dependents_trigger();
  ptx::dependency_wait();
  embed(a, packed, blockIdx.x, a.token[blockIdx.x]);
}

// One block per sequence: the token of `step`, its probability, and its embedding for the next step.
template <class T>
__global__ void __launch_bounds__(kMaxMergeThreads, 1)
    draft_step_kernel(DraftArgs<T> a, PackedMatrix packed, int64_t step, int64_t tiles, const int64_t* token_map) {
  __shared__ ArgmaxLse shared[kMaxMergeThreads / 32];
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t b = blockIdx.x;
  const ArgmaxLse best = block_merge(merge_strided(a.partial + b * tiles, tiles), shared);
  const float probability = expf(best.value - log_sum_exp(best));
  const bool alive = is_alive(a, b, step);
  const bool drafted = a.draft_threshold == 0 || (alive && probability >= a.draft_threshold);
  const int64_t token = drafted ? chosen_token(best, token_map) : -1;
  if (!alive) copy_row<T>(a, a.state(step).row(b), nullptr);
  if (step + 1 < a.rows()) embed(a, packed, b, token);
  if (threadIdx.x != 0) return;
  a.tokens[b * a.num_speculations + step] = token;
  a.probability[b * a.num_speculations + step] = alive ? probability : 0.0f;
}

// One block per sequence: zeroes the last state of a sequence that stopped drafting.
template <class T>
__global__ void __launch_bounds__(kThreads) draft_clear_kernel(DraftArgs<T> a) {
  ptx::dependents_trigger();
  ptx::dependency_wait();
  if (!is_alive(a, blockIdx.x, a.num_speculations))
    copy_row<T>(a, a.state(a.num_speculations).row(blockIdx.x), nullptr);
}

template <class T>
cudaError_t draft(Chain& chain, const DraftArgs<T>& a, const Layers<T>& layers, const Layers<T>& draft_layers,
                  const Head<T>& head, HeadSampling sampling, HeadLogits logits, int64_t step_pitch) {
  const dim3 grid(static_cast<unsigned>(a.batch));
  const int64_t tiles = head_tiles(head.vocab_size);
  const PackedMatrix packed(a.embedding, a.vocab_size);  // unused if it is plain
  if (a.batch == 0 || a.rows() == 0) return cudaSuccess;
  sampling.position = layers.args.seq_lens;
  LSK_RETURN_IF_ERROR(launch(chain.next(grid, kThreads), draft_embed_kernel<T>, a, packed));
  for (int64_t row = 0; row < a.rows(); ++row) {
    const Rows<T> state = a.state(row);
    LSK_RETURN_IF_ERROR(layers.run(chain, {a.hidden, a.hidden_size}, state, row));
    Rows<const T> seen{state.data, state.pitch};
    if (draft_layers.num_layers > 0) {
      LSK_RETURN_IF_ERROR(draft_layers.run(chain, seen, {a.hidden, a.hidden_size}, row));
      seen = {a.hidden, a.hidden_size};
    }
    if (row == a.num_speculations) break;
    sampling.ahead = row;
    LSK_RETURN_IF_ERROR(exit_head_tiles(chain, head, seen, a.batch, sampling, logits, a.partial));
    LSK_RETURN_IF_ERROR(
        launch(chain.next(grid, merge_threads(tiles)), draft_step_kernel<T>, a, packed, row, tiles, head.token_map));
    if (logits.data != nullptr) logits.data += step_pitch;
  }
  if (!a.extend || a.draft_threshold == 0) return cudaSuccess;
  return launch(chain.next(grid, kThreads), draft_clear_kernel<T>, a);
}

#define LSK_INSTANTIATE(T)                                                                                    \
  template cudaError_t draft(Chain&, const DraftArgs<T>&, const Layers<T>&, const Layers<T>&, const Head<T>&, \
                             HeadSampling, HeadLogits, int64_t);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
