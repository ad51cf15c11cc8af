// verify_attention: causal grouped-query attention of M new rows over the cache that already holds their keys.
//
// One block takes a tile of 16 (row, query head) pairs of one key/value head, and a split of 128 positions. The split
// size is fixed, so a row's sums depend neither on the lengths nor on other rows. A short context has few small splits
// (128 positions of 64 columns are 32 KB), a long one has enough blocks to fill the GPU. The last block to finish
// combines the splits in order, without a second launch. The grid depends on the capacity, so that a captured graph
// serves every length; blocks past a length return at once.
#include "cuda/layer_ops.h"
#include "cuda/attention_tile.cuh"

namespace lsk {

template <class T>
struct AttentionArgs {
  Rows<const T> q;    // [R, H C]
  Rows<T> out;        // [R, H C]
  float* values;      // [B, G, splits, pairs, C]: sum of weight * value
  float2* peaks;      // [B, G, splits, pairs]: largest score, sum of weights
  unsigned* tickets;  // [B, G, tiles], zero before and after
  float factor;       // of a difference of scores
  int shared;         // query heads per key/value head
  int first, rows;    // rows of every sequence in this launch
  int splits;
  bool aligned;
};

// The 16 pairs of a block: pair p is row m = p / shared of the launch and head g * shared + p % shared.
template <class T>
struct PairTile {
  int b, g, begin, count, pairs;
  int64_t position;  // position of the launch's row 0
  int64_t slot;
  int reach;  // positions visible to the tile's last row

  __device__ __forceinline__ PairTile(const AttentionArgs<T>& a, const Cache<T>& cache) {
    b = blockIdx.y / cache.num_kv_heads, g = blockIdx.y % cache.num_kv_heads;
    pairs = a.rows * a.shared, begin = blockIdx.z * kPairs, count = min(kPairs, pairs - begin);
    position = cache.position(b) + a.first, slot = cache.slot(b);
    const int64_t last = position + (begin + count - 1) / a.shared + 1;
    reach = slot < 0 ? 0 : static_cast<int>(max(int64_t{0}, min(last, static_cast<int64_t>(cache.capacity))));
  }

  // Positions visible to a pair of the tile; 0 for a row outside of the cache.
  __device__ __forceinline__ int seen(const AttentionArgs<T>& a, const Cache<T>& cache, int pair) const {
    const int64_t at = position + (begin + pair) / a.shared;
    return pair < count && slot >= 0 && at >= 0 && at < cache.capacity ? static_cast<int>(at) + 1 : 0;
  }

  __device__ __forceinline__ int64_t head_offset(const AttentionArgs<T>& a, int pair, int head_dim) const {
    return static_cast<int64_t>(g * a.shared + (begin + pair) % a.shared) * head_dim;
  }

  __device__ __forceinline__ int64_t row(const AttentionArgs<T>& a, const Cache<T>& cache, int pair) const {
    return static_cast<int64_t>(b) * cache.rows + a.first + (begin + pair) / a.shared;
  }

  __device__ __forceinline__ int64_t cell(const AttentionArgs<T>& a, const Cache<T>& cache, int split, int pair) const {
    return ((static_cast<int64_t>(b) * cache.num_kv_heads + g) * a.splits + split) * pairs + begin + pair;
  }
};

// Combines the splits of a tile's rows in order; a thread takes four columns of a pair. Loads eight splits together;
// past the end the last one is loaded again and not added.
template <class T>
__device__ __forceinline__ void join_splits(const AttentionArgs<T>& a, const Cache<T>& cache, const PairTile<T>& tile) {
  constexpr int kBatch = 8;
  const int quads = cache.head_dim / 4;
  for (int i = threadIdx.x; i < tile.count * quads; i += kAttentionThreads) {
    const int pair = i / quads, c = i % quads * 4, seen = tile.seen(a, cache, pair), splits = divide_up(seen, kSplit);
    float peak = -INFINITY, mass = 0.0f, total[4] = {};
    for (int begin = 0; begin < splits; begin += kBatch) {
      float2 peaks[kBatch];
      float4 values[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t cell = tile.cell(a, cache, min(begin + k, splits - 1), pair);
        peaks[k] = a.peaks[cell];
        values[k] = *reinterpret_cast<const float4*>(a.values + cell * cache.head_dim + c);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const bool inside = begin + k < splits;  // a select: a branch would separate the loads
        const float higher = fmaxf(peak, peaks[k].x);
        const float kept = weigh<T>(peak - higher, a.factor), added = weigh<T>(peaks[k].x - higher, a.factor);
        const float parts[4] = {values[k].x, values[k].y, values[k].z, values[k].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] = inside ? __fmaf_rn(total[e], kept, parts[e] * added) : total[e];
        mass = inside ? __fmaf_rn(mass, kept, peaks[k].y * added) : mass;
        peak = inside ? higher : peak;
      }
    }
    T* out = a.out.row(tile.row(a, cache, pair)) + tile.head_offset(a, pair, cache.head_dim);
#pragma unroll
    for (int e = 0; e < 4; ++e) out[c + e] = from_float<T>(seen ? total[e] / mass : nanf(""));
  }
}

// Prefetches this block's keys and values of earlier rounds into L2. This is safe before the earlier launches have
// ended: of a chain only the last one, which accepts, changes the lengths, and the steps of a round write at or past
// them.
template <class T>
__device__ __forceinline__ void fetch_old(const AttentionArgs<T>& a, const Cache<T>& cache, const PairTile<T>& tile) {
  constexpr int kLine = 128 / sizeof(T);
  const int64_t old = min(cache.seq_lens[tile.b], static_cast<int64_t>(tile.reach));
  for (int64_t split = blockIdx.x; split * kSplit < old; split += gridDim.x) {
    const int64_t plane = cache.plane(tile.slot, tile.g) + split * kSplit * cache.head_dim;
    const int64_t count = min(static_cast<int64_t>(kSplit), old - split * kSplit) * cache.head_dim;
    for (int64_t i = threadIdx.x * kLine; i < count; i += kAttentionThreads * kLine) {
      ptx::prefetch_l2(cache.k + plane + i);
      ptx::prefetch_l2(cache.v + plane + i);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 1) verify_attention_kernel(AttentionArgs<T> a, Cache<T> cache) {
  __shared__ bool last;
  ptx::dependents_trigger();
  const PairTile<T> tile(a, cache);
  fetch_old(a, cache, tile);
  ptx::dependency_wait();
  auto& memory = *ptx::dynamic_shared<AttentionMemory<T>>();
  for (int split = blockIdx.x; split * kSplit < tile.reach; split += gridDim.x) {
    const int64_t plane = cache.plane(tile.slot, tile.g) + static_cast<int64_t>(split) * kSplit * cache.head_dim;
    SplitWork<T> work{cache.k + plane, cache.v + plane, cache.head_dim, min(kSplit, tile.reach - split * kSplit),
                      a.aligned,       a.factor};
    const int64_t cell = tile.cell(a, cache, split, 0);
    attend_split(
        work, tile.count,
        [&](int pair) { return a.q.row(tile.row(a, cache, pair)) + tile.head_offset(a, pair, cache.head_dim); },
        [&](int pair) { return tile.seen(a, cache, pair) - split * kSplit; }, a.peaks + cell,
        a.values + cell * cache.head_dim, memory);
    __syncthreads();  // before the memory is reused, and before the ticket publishes the results
  }
  if (threadIdx.x == 0) {
    unsigned* ticket = a.tickets + blockIdx.y * gridDim.z + blockIdx.z;
    last = ptx::ticket(ticket) == gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) join_splits(a, cache, tile);
}

__global__ void clear_tickets_kernel(unsigned* tickets, int64_t count) {
  ptx::dependents_trigger();
  ptx::dependency_wait();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) tickets[i] = 0;
}

cudaError_t clear_tickets(Chain& chain, const AttentionScratch& scratch, void* memory) {
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(scratch.tickets, 256)));
  return launch(chain.next(grid, 256), clear_tickets_kernel, static_cast<unsigned*>(memory), scratch.tickets);
}

template <class T>
cudaError_t verify_attention(Chain& chain, Rows<const T> q, const Cache<T>& cache, const AttentionScratch& scratch,
                             void* memory, Rows<T> out) {
  constexpr int kBlocks = 512;  // four per SM, enough to saturate its bandwidth; blocks loop over further splits
  char* bytes = static_cast<char*>(memory);
  AttentionArgs<T> args{q, out};
  args.tickets = reinterpret_cast<unsigned*>(bytes);
  args.peaks = reinterpret_cast<float2*>(bytes + scratch.ticket_bytes());
  args.values = reinterpret_cast<float*>(bytes + scratch.ticket_bytes() + scratch.peak_bytes());
  args.factor = weight_factor<T>(cache.head_dim);
  args.shared = static_cast<int>(scratch.pairs_per_row);
  args.splits = static_cast<int>(scratch.splits);
  args.aligned = q.aligned() && is_aligned(cache.k, cache.head_dim) && is_aligned(cache.v, cache.head_dim);
  for (args.first = 0; args.first < cache.rows; args.first += scratch.rows_at_once) {
    args.rows = std::min(scratch.rows_at_once, cache.rows - args.first);
    const int tiles = divide_up(args.rows * args.shared, kPairs), planes = cache.batch * cache.num_kv_heads;
    const int wide = std::max(1, kBlocks / std::max(1, planes * tiles));
    const dim3 grid(std::min(args.splits, wide), planes, tiles);
    LSK_RETURN_IF_ERROR(launch(chain.next(grid, kAttentionThreads, AttentionMemory<T>::bytes(cache.head_dim)),
                               verify_attention_kernel<T>, args, cache));
  }
  return cudaSuccess;
}

#define LSK_INSTANTIATE(T)                                                                                      \
  template cudaError_t verify_attention(Chain&, Rows<const T>, const Cache<T>&, const AttentionScratch&, void*, \
                                        Rows<T>);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
