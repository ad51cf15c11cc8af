// accept_sampled: speculative rejection sampling (Leviathan et al. 2023).
//
// It takes the vocabulary in stretches of 4096, many blocks at once, and reads each row of logits once, the
// row that decides twice:
//   1. rows:    the arg-max and log-sum-exp of each stretch of every row of logits;
//   2. invert:  with a token map, where in the draft's logits a token is;
//   3. decide:  how many drafts agree, then the best of each stretch of what the next token is drawn from;
//   4. finish:  the best of all stretches, and the lengths.
// A sum or a maximum has one order, which depends on V alone.
#pragma once

#include "cuda/accept_sampled.h"
#include "cuda/choice.cuh"
#include "cuda/noise.cuh"
#include "cuda/ptx.cuh"

namespace lsk {

constexpr int64_t kUndecided = -2;  // next_token until step 4, where it is sampled

__device__ __forceinline__ void merge(Best& best, Best other) {
  if (other.key > best.key || (other.key == best.key && other.token < best.token)) best = other;
}

__device__ __forceinline__ void merge(Pick& pick, const Pick& other) {
  merge(pick.residual, other.residual);
  merge(pick.plain, other.plain);
}

__device__ __forceinline__ Best of_lane(Best best, int mask) {
  return {__shfl_xor_sync(kWarpMask, best.key, mask), __shfl_xor_sync(kWarpMask, best.token, mask)};
}

__device__ __forceinline__ void merge_warp(Pick& pick) {
  for (int mask = 16; mask > 0; mask /= 2) merge(pick, {of_lane(pick.residual, mask), of_lane(pick.plain, mask)});
}

__device__ __forceinline__ Pick no_pick() { return {{-INFINITY, INT_MAX}, {-INFINITY, INT_MAX}}; }

// A row of logits; rows as in `rows`.
__device__ __forceinline__ const float* logits_of(const SampledArgs& a, int64_t b, int64_t row) {
  return row <= a.drafted ? a.target_logits + (b * (a.drafted + 1) + row) * a.vocab_size
                          : a.draft_logits + (b * a.drafted + row - a.drafted - 1) * a.draft_vocab_size;
}

__device__ __forceinline__ float divisor_of(const SampledArgs& a, int64_t b) {
  return a.temperature[b] > 0 ? a.temperature[b] : 1.0f;
}

__device__ __forceinline__ int64_t stretch_end(int64_t begin, int64_t vocab_size) {
  return min(begin + kStretch, vocab_size);
}

// Block (stretch, row of a sequence, sequence).
template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) accept_rows_kernel(SampledArgs a) {
  __shared__ Choice shared[kMaxThreads / 32];
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t row = blockIdx.y, b = blockIdx.z, begin = static_cast<int64_t>(blockIdx.x) * kStretch;
  if (a.inverse != nullptr && row == 0 && b == 0)
    for (int64_t v = begin + threadIdx.x; v < stretch_end(begin, a.vocab_size); v += blockDim.x) a.inverse[v] = -1;
  const int64_t vocab_size = row <= a.drafted ? a.vocab_size : a.draft_vocab_size;
  const float *logits = logits_of(a, b, row), divisor = divisor_of(a, b);
  Choice own = no_choice();
  for (int64_t v = begin + threadIdx.x; v < stretch_end(begin, vocab_size); v += blockDim.x)
    merge(own, choice_of(logits[v] / divisor, 0.0f, static_cast<int>(v)));
  own = block_choice(own, shared);
  if (threadIdx.x == 0) a.rows[(b * a.rows_each() + row) * a.stretches + blockIdx.x] = own;
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

// What steps 3 and 4 know of a sequence: its rows' choices, in shared memory, and its parameters.
struct Sequence {
  const SampledArgs& a;
  const Choice* rows;
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

  // -inf for a token that the draft's head does not have.
  __device__ __forceinline__ float log_q(int64_t row, int64_t token) const {
    const int64_t place = a.inverse != nullptr ? a.inverse[token] : token;
    return place < 0 || place >= a.draft_vocab_size ? -INFINITY : log_p(a.drafted + 1 + row, place);
  }

  // Both of the target and, where drafts are sampled from them, of the draft.
  __device__ __forceinline__ bool usable(int64_t row) const {
    const bool needs_draft = row < a.drafted && sampled && a.draft[b * a.drafted + row] >= 0;
    return valid(row) && (!needs_draft || valid(a.drafted + 1 + row));
  }

  __device__ __forceinline__ NoiseKey noise(int64_t row, NoiseStream stream) const {
    return {static_cast<uint64_t>(a.seed[b]), static_cast<uint64_t>(a.seq_lens[b] + row), stream};
  }

  __device__ __forceinline__ bool agrees(int64_t row) const {
    const int64_t draft = a.draft[b * a.drafted + row];
    if (draft < 0 || !usable(row)) return false;
    if (!sampled) return draft == rows[row].row;
    const int64_t token = min(draft, a.vocab_size - 1);
    return logf(noise(row, kAcceptStream).uniform(0)) < log_p(row, token) - log_q(row, token);
  }
};

// The choices of sequence b's rows, merged: one warp a row.
__device__ __forceinline__ void merge_rows(const SampledArgs& a, int64_t b, Choice* rows) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = threadIdx.x / 32; row < a.rows_each(); row += blockDim.x / 32) {
    const Choice* stretches = a.rows + (b * a.rows_each() + row) * a.stretches;
    Choice all = no_choice();
    for (int i = lane; i < a.stretches; i += 32) merge(all, stretches[i]);
    for (int mask = 16; mask > 0; mask /= 2) merge_lane(all, mask);
    if (lane == 0) rows[row] = all;
  }
}

// Block (stretch, sequence); its dynamic shared memory holds the choices of the sequence's rows.
template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) accept_decide_kernel(SampledArgs a) {
  __shared__ Pick shared[kMaxThreads / 32];
  __shared__ int first_rejected;
  ptx::dependents_trigger();
  ptx::dependency_wait();
  Choice* rows = ptx::dynamic_shared<Choice>();
  const int64_t b = blockIdx.y, begin = static_cast<int64_t>(blockIdx.x) * kStretch;
  const Sequence sequence{a, rows, b, divisor_of(a, b), a.temperature[b] > 0};
  if (threadIdx.x == 0) first_rejected = static_cast<int>(a.drafted);
  merge_rows(a, b, rows);
  __syncthreads();
  for (int row = threadIdx.x; row < a.drafted; row += blockDim.x)
    if (!sequence.agrees(row)) atomicMin(&first_rejected, row);
  __syncthreads();
  const int count = first_rejected;
  const bool usable = sequence.usable(count), sampled = sequence.sampled && usable;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    a.accepted[b] = count;
    a.next_token[b] = !usable ? -1 : sampled ? kUndecided : rows[count].row;
  }
  if (!sampled) return;
  const bool rejected = count < a.drafted && a.draft[b * a.drafted + count] >= 0;
  const NoiseKey noise = sequence.noise(count, kTargetStream);
  const float total = log_sum_exp(rows[count]);
  Pick own = no_pick();
  for (int64_t v = begin + threadIdx.x; v < stretch_end(begin, a.vocab_size); v += blockDim.x) {
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
  a.picks[b * a.stretches + blockIdx.x] = own;
}

// One warp a sequence.
template <int kBlock>
__global__ void __launch_bounds__(kBlock) accept_finish_kernel(SampledArgs a) {
  static_assert(kBlock == 32);
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t b = blockIdx.x;
  if (a.next_token[b] == kUndecided) {
    Pick all = no_pick();
    for (int i = threadIdx.x; i < a.stretches; i += kBlock) merge(all, a.picks[b * a.stretches + i]);
    merge_warp(all);
    // Nothing is rejected, or rounding left no residual.
    const bool residual = all.residual.key > -INFINITY;
    __syncwarp();
    if (threadIdx.x == 0) a.next_token[b] = residual ? all.residual.token : all.plain.token;
  }
  if (threadIdx.x == 0) a.seq_lens[b] += a.accepted[b] + 1;
}

cudaError_t accept_sampled(Chain& chain, const SampledArgs& a) {
  constexpr int kMaxThreads = 256;
  const unsigned stretches = a.stretches, batch = static_cast<unsigned>(a.batch);
  if (batch == 0) return cudaSuccess;
  const unsigned rows = static_cast<unsigned>(a.rows_each());
  const int needed = static_cast<int>(divide_up<int64_t>(a.vocab_size, 32)) * 32;
  const int threads = needed < kMaxThreads ? needed : kMaxThreads;
  LSK_LAUNCH(launch(chain.next(dim3(stretches, rows, batch), threads), accept_rows_kernel<kMaxThreads>, a));
  if (a.token_map != nullptr) {
    const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(a.draft_vocab_size, kMaxThreads)));
    LSK_LAUNCH(launch(chain.next(grid, kMaxThreads), accept_invert_kernel<kMaxThreads>, a.token_map, a.draft_vocab_size,
                      a.vocab_size, a.inverse));
  }
  const size_t shared = rows * sizeof(Choice);
  LSK_LAUNCH(launch(chain.next(dim3(stretches, batch), threads, shared), accept_decide_kernel<kMaxThreads>, a));
  return launch(chain.next(dim3(batch), 32), accept_finish_kernel<32>, a);
}

}  // namespace lsk
