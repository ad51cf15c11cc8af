// How workers share attention. Few rows: each takes splits of the positions; after a barrier each combines the splits
// of some rows. Many rows: each takes rows.
#pragma once

#include <algorithm>

#include "cpu/common.h"

namespace lsk {

template <class T>
struct AttentionStep {
  const T* q;                       // [B, M, H, C]
  const T *k_cache, *v_cache;       // [S, G, T, C]
  const int64_t *seq_lens, *slots;  // [B], the second or null
  int64_t batch, rows, num_heads, num_kv_heads, capacity, head_dim;
  int64_t splits;  // of the longest sequence
  float* partial;  // few rows: [splits, B, G, M, H/G, partial_pitch(C)], else [threads, 2, M, H/G, partial_pitch(C)]

  static int64_t count_splits(const int64_t* seq_lens, int64_t batch, int64_t rows) {
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; ++b) longest = seq_lens[b] > longest ? seq_lens[b] : longest;
    return (longest + rows + kSplit - 1) / kSplit;
  }
  // Floats in `partial`.
  template <class Shape>
  static int64_t partial_size(const Shape& s, int64_t splits, int threads) {
    const int64_t heads = product(s.rows, s.num_heads, partial_pitch(s.head_dim));  // of a sequence
    if (s.rows < kFewRows) return product(splits, s.batch, heads);
    product(s.batch, s.num_kv_heads, s.rows, s.capacity);  // the work that `share` counts
    return product(2, threads, heads / s.num_kv_heads);
  }

  // Writes out [B, M, H, C]. Few rows: this worker writes the rows `own` of B * M * H, without a barrier after it. Many
  // rows: all of them are complete on return.
  void run(const Worker& worker, const Range& own, T* out) const {
    if (rows < kFewRows) {
      attend_splits(worker);
      worker.wait();
      combine(own.begin, own.end, out);
    } else {
      attend_rows(worker, out);
      worker.wait();
    }
  }

 private:
  int64_t ratio() const { return num_heads / num_kv_heads; }
  int64_t split_size() const { return batch * num_kv_heads * rows * ratio() * partial_pitch(head_dim); }
  int64_t positions(int64_t sequence) const { return seq_lens[sequence] + rows; }
  int64_t cache_at(int64_t sequence, int64_t kv_head) const {
    return (slot_of(slots, sequence) * num_kv_heads + kv_head) * capacity * head_dim;
  }

  // Calls visit(sequence, range) for this worker's share of the work: each sequence has `parts` * positions of it.
  template <class F>
  void share(const Worker& worker, int64_t parts, F visit) const {
    int64_t total = 0, at = 0;
    for (int64_t sequence = 0; sequence < batch; ++sequence) total += parts * positions(sequence);
    const Range own = worker.share(total);
    for (int64_t sequence = 0; sequence < batch; ++sequence) {
      visit(sequence, Range{own.begin - at, own.end - at});
      at += parts * positions(sequence);
    }
  }

  // Splits differ in length, so workers share positions: each takes the splits that start within its share.
  void attend_splits(const Worker& worker) const {
    share(worker, num_kv_heads, [&](int64_t sequence, const Range& own) {
      const int64_t count = positions(sequence);
      for (int64_t task = 0; task < num_kv_heads * splits; ++task) {
        const int64_t kv_head = task / splits, split = task % splits, start = kv_head * count + split * kSplit;
        if (split * kSplit < count && own.begin <= start && start < own.end) attend_split(sequence, kv_head, split);
      }
    });
  }

  void attend_split(int64_t sequence, int64_t kv_head, int64_t split) const {
    // The next split: of the same head, or the first one of the next head.
    int64_t next = cache_at(sequence, kv_head) + (split + 1) * kSplit * head_dim;
    if ((split + 1) * kSplit >= positions(sequence)) {
      const bool more = kv_head + 1 < num_kv_heads;
      next = cache_at(more || sequence + 1 == batch ? sequence : sequence + 1, more ? kv_head + 1 : 0);
    }
    float* out =
        partial + split * split_size() + (sequence * num_kv_heads + kv_head) * rows * ratio() * partial_pitch(head_dim);
    kernels<T>().attend(args(sequence, kv_head, {0, rows}, next, out), split);
  }

  // Processes all splits of a row in turn, which keeps partial results out of memory. Workers share rows.
  void attend_rows(const Worker& worker, T* out) const {
    float* own_partial = partial + worker.index * 2 * rows * ratio() * partial_pitch(head_dim);
    share(worker, num_kv_heads * rows, [&](int64_t sequence, const Range& own) {
      const int64_t count = positions(sequence);
      for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
        const auto row = [&](int64_t place) {
          return std::clamp<int64_t>((place + count - 1) / count - kv_head * rows, 0, rows);
        };
        const Range mine{row(own.begin), row(own.end)};
        if (mine.begin == mine.end) continue;
        const int64_t next = cache_at(sequence, kv_head + 1 < num_kv_heads ? kv_head + 1 : 0);
        T* first = out + ((sequence * rows + mine.begin) * num_heads + kv_head * ratio()) * head_dim;
        kernels<T>().attend_rows(args(sequence, kv_head, mine, next, own_partial), first);
      }
    });
  }

  // Arguments for some rows of a sequence and one key/value head; `next` is the cache offset that is read afterwards.
  AttentionArgs<T> args(int64_t sequence, int64_t kv_head, const Range& own, int64_t next, float* out) const {
    const int64_t at = cache_at(sequence, kv_head);
    return {q + (sequence * rows + own.begin) * num_heads * head_dim,
            k_cache + at,
            v_cache + at,
            k_cache + next,
            seq_lens[sequence] + own.begin,
            own.end - own.begin,
            num_heads,
            head_dim,
            kv_head,
            ratio(),
            out};
  }

  // Combines rows [begin, end) of the B * M * H query rows into out [B, M, H, C].
  void combine(int64_t begin, int64_t end, T* out) const {
    const Kernels<T>& table = kernels<T>();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t head = row % num_heads, m = row / num_heads % rows, sequence = row / num_heads / rows;
      const int64_t kv_head = head / ratio();
      const float* own = partial + (((sequence * num_kv_heads + kv_head) * rows + m) * ratio() + head % ratio()) *
                                       partial_pitch(head_dim);
      table.combine(own, split_size(), (seq_lens[sequence] + m) / kSplit + 1, head_dim, out + row * head_dim);
    }
  }
};

// Rotates queries into `q_out` and keys into the cache, and copies values there; norms q and k first, if given.
template <class T>
struct RopeStep {
  const T *q, *k, *v;        // [B, M, H, C], [B, M, G, C] twice
  const T *q_norm, *k_norm;  // [C] or null
  const float *cos, *sin;    // [T, C/2]
  T *q_out, *k_cache, *v_cache;
  const int64_t *seq_lens, *slots;  // [B], the second or null
  int64_t batch, rows, num_heads, num_kv_heads, capacity, head_dim;
  float eps;

  void run(const Worker& worker) const {
    const Kernels<T>& table = kernels<T>();
    const int64_t vectors = num_heads + 2 * num_kv_heads;
    const Range tasks = worker.share(batch * rows * vectors);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t vector = task % vectors, row = task / vectors, sequence = row / rows;
      const int64_t position = seq_lens[sequence] + row % rows;
      const RopeArgs<T> args = {vector < num_heads ? q_norm : k_norm, cos + position * head_dim / 2,
                                sin + position * head_dim / 2, head_dim, eps};
      if (vector < num_heads) {
        const int64_t at = (row * num_heads + vector) * head_dim;
        table.rope(args, q + at, q_out + at);
        continue;
      }
      const int64_t kv_head = (vector - num_heads) % num_kv_heads, at = (row * num_kv_heads + kv_head) * head_dim;
      const int64_t slot = ((slot_of(slots, sequence) * num_kv_heads + kv_head) * capacity + position) * head_dim;
      if (vector < num_heads + num_kv_heads) {
        table.rope(args, k + at, k_cache + slot);
      } else {
        for (int64_t i = 0; i < head_dim; ++i) v_cache[slot + i] = v[at + i];
      }
    }
  }
};

}  // namespace lsk
