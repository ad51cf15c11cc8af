// Attention of the query heads that share one key/value head, over one split of the positions, and the ordered
// combination of splits. Included inside the namespace of the instruction set.

// A split is read tile by tile. A tile's keys are transposed once, for all query rows, so that both products, of
// queries and keys and of weights and values, are sums of vectors times a number: no sum across the lanes of a
// register. Each sum runs in one register over the columns of a head or the positions, whatever the blocking around it.

#include "cpu/impl_scores.h"
#include "cpu/impl_values.h"

// One tile of keys and values.
template <class T>
struct Tile {
  using X = typename Dot<T>::X;
  const float* words;  // the keys, transposed
  const T* values;     // [kPositions, C]
  float* pairs;        // room for the values in pairs, where many rows weigh them so, else null
  int64_t unpaired;    // how many are still to be put there: only after the first scores, until when they are fetched
  int64_t head_dim;
  Ahead &own_values, &next_keys;

  // For ROWS query rows, which all see `count` positions of it.
  template <int ROWS>
  void attend(const X* const* queries, int64_t count, const Seen& seen) {
    constexpr int kWide = kColumns<ROWS>;
    alignas(64) float scores[ROWS * kPositions];
    const int64_t width = head_dim * 16 / Dot<T>::kStep / kWordParts<T>;
    int64_t t = 0, c = 0;
    for (; t + 16 * kWide <= count; t += 16 * kWide)
      score_columns<T, ROWS, kWide>(queries, words, width, t, own_values, scores);
    for (; t < count; t += 16) score_columns<T, ROWS, 1>(queries, words, width, t, own_values, scores);
    F16 shrink[ROWS];
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
    if constexpr (kWeighsPairs<T>) {
      alignas(64) T numerators[ROWS * kPositions];
      rounded_numerators<T, ROWS>(scores, count, scale, seen, shrink, numerators);
      if (pairs && unpaired) pair_values(values, unpaired, head_dim, pairs);
      unpaired = 0;
      const auto weigh = [&](const auto& from) {
        for (; c + 64 <= padded(head_dim); c += 64)
          weigh_pairs<T, ROWS, 4>(numerators, from, count, c, seen, shrink, next_keys);
        for (; c < head_dim; c += 32) weigh_pairs<T, ROWS, 2>(numerators, from, count, c, seen, shrink, next_keys);
      };
      pairs ? weigh(SharedPairs{pairs, padded(head_dim)}) : weigh(OwnPairs<T>{values, head_dim});
    } else {
      softmax_numerators<ROWS>(scores, count, scale, seen, shrink);
      for (; c + 16 * kWide <= head_dim; c += 16 * kWide)
        weigh_columns<T, ROWS, kWide>(scores, values, count, head_dim, c, seen, shrink, next_keys);
      for (; c < head_dim; c += 16)
        weigh_columns<T, ROWS, 1>(scores, values, count, head_dim, c, seen, shrink, next_keys);
    }
  }

  void attend(int rows, const X* const* queries, int64_t count, const Seen& seen) {
    switch (rows) {
      case 1:
        return attend<1>(queries, count, seen);
      case 2:
        return attend<2>(queries, count, seen);
      case 3:
        return attend<3>(queries, count, seen);
#if LSK_MAX_BLOCK > 2
      case 4:
        return attend<4>(queries, count, seen);
      case 5:
        return attend<5>(queries, count, seen);
      default:
        return attend<6>(queries, count, seen);
#endif
    }
  }
};

// The tile that starts at `start`, the first of its split or not, for all query rows, counted from (m = 0, head 0):
// row = m * ratio + head. Rows that see equally far form a block, so that it is loaded once for all of them.
template <class T>
inline void attend_tile(const AttentionArgs<T>& a, int64_t start, bool first, const T* next) {
  using X = typename Dot<T>::X;
  const auto visible = [&](int64_t row) {
    const int64_t seen = a.length + row / a.ratio + 1 - start;
    return seen < 0 ? 0 : smaller(seen, kPositions);
  };
  alignas(64) float words[kMaxHead * kPositions];
  alignas(64) X packed[kRowsAtOnce * kMaxHead];  // where T is not what is multiplied
  const X* queries[kRowsAtOnce];
  const int64_t rows = a.rows * a.ratio, pitch = partial_pitch(a.head_dim), last = visible(rows - 1);
  Ahead own_values(a.values + start * a.head_dim, last * a.head_dim), next_keys(next, kPositions * a.head_dim);
  for (int64_t t = 0; t < last; t += 16) {
    const T* keys[16];  // the last one again where they are fewer
    for (int64_t i = 0; i < 16; ++i) keys[i] = a.keys + (start + smaller(t + i, last - 1)) * a.head_dim;
    transpose_keys(keys, a.head_dim, words + t, own_values);
  }
  alignas(64) float pairs[kWeighsPairs<T> ? kMaxHead * kPositions / 2 : 1];
  const T* values = a.values + start * a.head_dim;
  const bool shared = rows > 2 * kRowsAtOnce || a.head_dim % 32;  // twice is cheaper than to store them
  Tile<T> tile = {words, values, shared ? pairs : nullptr, last, a.head_dim, own_values, next_keys};
  for (int64_t r = 0; r < rows;) {
    const int64_t count = visible(r);
    int block = 0;
    for (; block < kRowsAtOnce && r + block < rows && visible(r + block) == count; ++block) {
      const int64_t row = r + block, m = row / a.ratio, head = a.kv_head * a.ratio + row % a.ratio;
      const T* query = a.q + (m * a.num_heads + head) * a.head_dim;
      if constexpr (sizeof(T) == sizeof(X)) {
        queries[block] = query;
      } else {
        X* own = packed + block * kMaxHead;
        pack_row<T, X>(query, nullptr, 0.0f, a.head_dim, own);
        queries[block] = own;
      }
    }
    const Seen seen = {a.partial + r * pitch, pitch, first};
    if (count > 0) tile.attend(block, queries, count, seen);
    r += block;
  }
}

template <class T>
void attend(const AttentionArgs<T>& a, int64_t split) {
  const int64_t begin = split * kSplit, end = smaller(begin + kSplit, a.length + a.rows);
  for (int64_t start = begin; start < end; start += kPositions)
    attend_tile(a, start, start == begin,
                start + kPositions < end ? a.keys + (start + kPositions) * a.head_dim : a.next_keys);
}

// What a row has seen of a split goes to what it has seen of those before it. One of the two keeps its maximum.
inline void merge(const float* split, int64_t head_dim, float* whole) {
  const float rise = split[0] - whole[0];
  const F16 less = exp(splat(rise > 0 ? -rise : rise)), one = splat(1);
  const F16 own = rise > 0 ? one : less, before = rise > 0 ? less : one;
  if (rise > 0) whole[0] = split[0];
  for (int64_t i = 16; i < partial_pitch(head_dim); i += 16)
    store(whole + i, fma(load(split + i), own, load(whole + i) * before));
}

template <class T>
inline void finish(const float* whole, int64_t head_dim, T* out) {
  const F16 sums = splat(total(load(whole + 16)));
  for (int64_t c = 0; c < head_dim; c += 32) {
    F16 values[2] = {load(whole + kPartialHead + c) / sums, load(whole + kPartialHead + c + 16) / sums};
    if constexpr (kWeighsPairs<T>) zip(values, values + 1);
    for (int64_t i = 0; i < 2 && c + 16 * i < head_dim; ++i)
      store(out + c + 16 * i, values[i], smaller(16, head_dim - c - 16 * i));
  }
}

// One query row from its splits, `stride` floats apart.
template <class T>
void combine(const float* partial, int64_t stride, int64_t splits, int64_t head_dim, T* out) {
  alignas(64) float whole[kPartialHead + kMaxHead];
  __builtin_memcpy(whole, partial, partial_pitch(head_dim) * sizeof(float));
  for (int64_t s = 1; s < splits; ++s) merge(partial + s * stride, head_dim, whole);
  finish(whole, head_dim, out);
}

// All splits of rows [0, M), one after the other, which takes memory for two of them.
template <class T>
void attend_rows(const AttentionArgs<T>& a, T* out) {
  const int64_t rows = a.rows * a.ratio, pitch = partial_pitch(a.head_dim), end = a.length + a.rows;
  float* whole = a.partial + rows * pitch;
  AttentionArgs<T> step = a;
  for (int64_t begin = 0; begin < end; begin += kSplit) {
    step.partial = begin == 0 ? whole : a.partial;
    step.next_keys = begin + kSplit < end ? a.keys + (begin + kSplit) * a.head_dim : a.next_keys;
    attend(step, begin / kSplit);
    for (int64_t r = 0; begin > 0 && r < rows; ++r)
      if (begin <= a.length + r / a.ratio) merge(a.partial + r * pitch, a.head_dim, whole + r * pitch);
  }
  for (int64_t r = 0; r < rows; ++r)
    finish(whole + r * pitch, a.head_dim, out + (r / a.ratio * a.num_heads + r % a.ratio) * a.head_dim);
}
