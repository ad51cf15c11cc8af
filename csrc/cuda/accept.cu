// accept_greedy: accepts the leading draft tokens that equal the target's.
// accept_sampled: speculative rejection sampling (Leviathan et al. 2023).
//
// accept_sampled splits the vocabulary into tiles of 4096, one per block, and reads each row of logits once, the row of
// the next token twice:
//   1. rows:    the arg-max and log-sum-exp of each tile of every row of logits;
//   2. invert:  with a token map, the row of each token in the draft's logits;
//   3. decide:  the number of accepted drafts, then the best candidate of each tile for the next token;
//   4. finish:  the best candidate of all tiles, and the lengths.
// The order of sums and maxima depends on V alone.
#include "cuda/accept.h"
#include "cuda/argmax_lse.cuh"
#include "cuda/noise.cuh"
#include "cuda/ptx.cuh"

namespace lsk {

// Advances a length past the accepted drafts and the next token. One that cannot advance stays, and there is no token.
__device__ __forceinline__ void advance(int64_t& length, int64_t& accepted, int64_t& next_token) {
  if (0 <= length && length < INT64_MAX - accepted) {
    length += accepted + 1;
  } else {
    accepted = 0, next_token = -1;
  }
}

// One thread per sequence.
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    accept_greedy_kernel(const int64_t* draft, const int64_t* target, int64_t* seq_lens, int64_t* accepted,
                         int64_t* next_token, int64_t batch, int64_t num_speculations) {
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (b >= batch) return;
  const int64_t *own = draft + b * num_speculations, *wanted = target + b * (num_speculations + 1);
  int64_t count = 0;
  while (count < num_speculations && own[count] >= 0 && own[count] == wanted[count]) ++count;
  accepted[b] = count;
  next_token[b] = wanted[count];
  advance(seq_lens[b], accepted[b], next_token[b]);
}

cudaError_t accept_greedy(Chain& chain, const int64_t* draft, const int64_t* target, int64_t* seq_lens,
                          int64_t* accepted, int64_t* next_token, int64_t batch, int64_t num_speculations) {
  constexpr int kBlock = 128;
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(batch, kBlock)));
  return launch(chain.next(grid, kBlock), accept_greedy_kernel<kBlock>, draft, target, seq_lens, accepted, next_token,
                batch, num_speculations);
}

constexpr int64_t kUndecided = -2;  // next_token until step 4, if it is sampled

__device__ __forceinline__ void merge(ScoredToken& best, ScoredToken other) {
  if (other.key > best.key || (other.key == best.key && other.token < best.token)) best = other;
}

__device__ __forceinline__ void merge(SampleCandidates& candidates, const SampleCandidates& other) {
  merge(candidates.residual, other.residual);
  merge(candidates.plain, other.plain);
}

__device__ __forceinline__ ScoredToken of_lane(ScoredToken best, int mask) {
  return {__shfl_xor_sync(kWarpMask, best.key, mask), __shfl_xor_sync(kWarpMask, best.token, mask)};
}

__device__ __forceinline__ void merge_warp(SampleCandidates& candidates) {
  for (int mask = 16; mask > 0; mask /= 2)
    merge(candidates, {of_lane(candidates.residual, mask), of_lane(candidates.plain, mask)});
}

__device__ __forceinline__ SampleCandidates no_candidates() { return {{-INFINITY, INT_MAX}, {-INFINITY, INT_MAX}}; }

// A row of logits, numbered as in `rows`.
__device__ __forceinline__ const float* logits_of(const AcceptSampledArgs& a, int64_t b, int64_t row) {
  return row <= a.num_speculations
             ? a.target_logits + (b * (a.num_speculations + 1) + row) * a.vocab_size
             : a.draft_logits + (b * a.num_speculations + row - a.num_speculations - 1) * a.draft_vocab_size;
}

__device__ __forceinline__ float divisor_of(const AcceptSampledArgs& a, int64_t b) {
  return a.temperature[b] > 0 ? a.temperature[b] : 1.0f;
}

__device__ __forceinline__ int64_t tile_end(int64_t begin, int64_t vocab_size) {
  return min(begin + kAcceptTile, vocab_size);
}

// Block (tile, row of a sequence, sequence).
template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) accept_rows_kernel(AcceptSampledArgs a) {
  __shared__ ArgmaxLse shared[kMaxThreads / 32];
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t row = blockIdx.y, b = blockIdx.z, begin = static_cast<int64_t>(blockIdx.x) * kAcceptTile;
  if (a.inverse != nullptr && row == 0 && b == 0)
    for (int64_t v = begin + threadIdx.x; v < tile_end(begin, a.vocab_size); v += blockDim.x) a.inverse[v] = -1;
  const int64_t vocab_size = row <= a.num_speculations ? a.vocab_size : a.draft_vocab_size;
  const float *logits = logits_of(a, b, row), divisor = divisor_of(a, b);
  ArgmaxLse own = empty_argmax_lse();
  for (int64_t v = begin + threadIdx.x; v < tile_end(begin, vocab_size); v += blockDim.x)
    merge(own, make_argmax_lse(logits[v] / divisor, 0.0f, static_cast<int>(v)));
  own = block_merge(own, shared);
  if (threadIdx.x == 0) a.rows[(b * a.rows_each() + row) * a.tiles + blockIdx.x] = own;
}

template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    accept_invert_kernel(const int64_t* token_map, int64_t count, int64_t vocab_size, int* inverse) {
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= count) return;
  const int64_t token = token_map[row];
  if (token >= 0 && token < vocab_size) inverse[token] = static_cast<int>(row);
}

// A sequence in step 3: the reductions of its rows, in shared memory, and its parameters.
struct Sequence {
  const AcceptSampledArgs& a;
  const ArgmaxLse* rows;
  int64_t b;
  float divisor;
  bool sampled;

  __device__ __forceinline__ bool valid(int64_t row) const { return fabsf(log_sum_exp(rows[row])) < INFINITY; }

  __device__ __forceinline__ float scaled(int64_t row, int64_t token) const {
    return logits_of(a, b, row)[token] / divisor;
  }
  __device__ __forceinline__ float log_p(int64_t row, int64_t token) const {
    return scaled(row, token) - log_sum_exp(rows[row]);
  }

  // -inf for a token that is not in the draft head.
  __device__ __forceinline__ float log_q(int64_t row, int64_t token) const {
    const int64_t place = a.inverse != nullptr ? a.inverse[token] : token;
    return place < 0 || place >= a.draft_vocab_size ? -INFINITY : log_p(a.num_speculations + 1 + row, place);
  }

  // Whether the logits of the target and, if the draft was sampled, of the draft are finite.
  __device__ __forceinline__ bool usable(int64_t row) const {
    const bool needs_draft = row < a.num_speculations && sampled && a.draft[b * a.num_speculations + row] >= 0;
    return valid(row) && (!needs_draft || valid(a.num_speculations + 1 + row));
  }

  __device__ __forceinline__ NoiseKey noise(int64_t row, NoiseStream stream) const {
    return {static_cast<uint64_t>(a.seed[b]), static_cast<uint64_t>(a.seq_lens[b]) + static_cast<uint64_t>(row),
            stream};
  }

  __device__ __forceinline__ bool agrees(int64_t row) const {
    const int64_t draft = a.draft[b * a.num_speculations + row];
    if (draft < 0 || !usable(row)) return false;
    if (!sampled) return draft == rows[row].row;
    const int64_t token = min(draft, a.vocab_size - 1);
    return logf(noise(row, kAcceptStream).uniform(0)) < log_p(row, token) - log_q(row, token);
  }
};

// Merges the tiles of each row of sequence b: one warp per row.
__device__ __forceinline__ void merge_rows(const AcceptSampledArgs& a, int64_t b, ArgmaxLse* rows) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = threadIdx.x / 32; row < a.rows_each(); row += blockDim.x / 32) {
    const ArgmaxLse* tiles = a.rows + (b * a.rows_each() + row) * a.tiles;
    ArgmaxLse all = empty_argmax_lse();
    for (int i = lane; i < a.tiles; i += 32) merge(all, tiles[i]);
    for (int mask = 16; mask > 0; mask /= 2) merge_lane(all, mask);
    if (lane == 0) rows[row] = all;
  }
}

// Block (tile, sequence); dynamic shared memory holds the reductions of the sequence's rows.
template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) accept_decide_kernel(AcceptSampledArgs a) {
  __shared__ SampleCandidates shared[kMaxThreads / 32];
  __shared__ int first_rejected;
  ptx::dependents_trigger();
  ptx::dependency_wait();
  ArgmaxLse* rows = ptx::dynamic_shared<ArgmaxLse>();
  const int64_t b = blockIdx.y, begin = static_cast<int64_t>(blockIdx.x) * kAcceptTile;
  const Sequence sequence{a, rows, b, divisor_of(a, b), a.temperature[b] > 0};
  if (threadIdx.x == 0) first_rejected = static_cast<int>(a.num_speculations);
  merge_rows(a, b, rows);
  __syncthreads();
  for (int row = threadIdx.x; row < a.num_speculations; row += blockDim.x)
    if (!sequence.agrees(row)) atomicMin(&first_rejected, row);
  __syncthreads();
  const int count = first_rejected;
  const bool usable = sequence.usable(count), sampled = sequence.sampled && usable;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    a.accepted[b] = count;
    a.next_token[b] = !usable ? -1 : sampled ? kUndecided : rows[count].row;
  }
  if (!sampled) return;
  const bool rejected = count < a.num_speculations && a.draft[b * a.num_speculations + count] >= 0;
  const NoiseKey noise = sequence.noise(count, kTargetStream);
  const float total = log_sum_exp(rows[count]);
  SampleCandidates own = no_candidates();
  for (int64_t v = begin + threadIdx.x; v < tile_end(begin, a.vocab_size); v += blockDim.x) {
    const int token = static_cast<int>(v);
    const float scaled = sequence.scaled(count, v), gumbel = noise.gumbel(static_cast<uint32_t>(v));
    merge(own.plain, {scaled + gumbel, token});
    if (rejected) {
      const float residual = logf(fmaxf(expf(scaled - total) - expf(sequence.log_q(count, v)), 0.0f));
      merge(own.residual, {residual + gumbel, token});
    }
  }
  merge_warp(own);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) merge(own, shared[warp]);
  a.candidates[b * a.tiles + blockIdx.x] = own;
}

// One warp per sequence.
template <int kBlock>
__global__ void __launch_bounds__(kBlock) accept_finish_kernel(AcceptSampledArgs a) {
  static_assert(kBlock == 32);
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t b = blockIdx.x;
  if (a.next_token[b] == kUndecided) {
    SampleCandidates all = no_candidates();
    for (int i = threadIdx.x; i < a.tiles; i += kBlock) merge(all, a.candidates[b * a.tiles + i]);
    merge_warp(all);
    // Otherwise nothing was rejected, or the residual rounded to zero.
    const bool residual = all.residual.key > -INFINITY;
    __syncwarp();
    if (threadIdx.x == 0) a.next_token[b] = residual ? all.residual.token : all.plain.token;
  }
  if (threadIdx.x == 0) advance(a.seq_lens[b], a.accepted[b], a.next_token[b]);
}

cudaError_t accept_sampled(Chain& chain, const AcceptSampledArgs& a) {
  constexpr int kMaxThreads = 256;
  const unsigned tiles = a.tiles, batch = static_cast<unsigned>(a.batch);
  if (batch == 0) return cudaSuccess;
  const unsigned rows = static_cast<unsigned>(a.rows_each());
  const int needed = static_cast<int>(divide_up<int64_t>(a.vocab_size, 32)) * 32;
  const int threads = needed < kMaxThreads ? needed : kMaxThreads;
  LSK_RETURN_IF_ERROR(launch(chain.next(dim3(tiles, rows, batch), threads), accept_rows_kernel<kMaxThreads>, a));
  if (a.token_map != nullptr) {
    const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(a.draft_vocab_size, kMaxThreads)));
    LSK_RETURN_IF_ERROR(launch(chain.next(grid, kMaxThreads), accept_invert_kernel<kMaxThreads>, a.token_map,
                               a.draft_vocab_size, a.vocab_size, a.inverse));
  }
  const size_t shared = rows * sizeof(ArgmaxLse);
  LSK_RETURN_IF_ERROR(launch(chain.next(dim3(tiles, batch), threads, shared), accept_decide_kernel<kMaxThreads>, a));
  return launch(chain.next(dim3(batch), 32), accept_finish_kernel<32>, a);
}

}  // namespace lsk
