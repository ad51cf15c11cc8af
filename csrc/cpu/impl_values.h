// Sums of a tile of values, weighed by the numerators of impl_scores.h. Included by impl_attention.h.

// The i-th of COLUMNS times sixteen values of one position, of which `last` exist in the last. Those that are read in
// pairs come as the even ones of thirty-two, then the odd ones, which takes half the work.
template <class T, int COLUMNS>
inline F16 load_values(const T* row, int i, int64_t last) {
  if constexpr (kPairs<T> && COLUMNS > 1) {
    const F16 words = load_pairs(row + i / 2 * 32);
    return i % 2 == 0 ? even(words) : odd(words);
  } else {
    return i < COLUMNS - 1 || last == 16 ? load(row + 16 * i) : load(row + 16 * i, last);
  }
}

// What rows have seen of some columns, shrunk, goes on by these sums.
template <int ROWS, int COLUMNS>
inline void add_columns(const F16 (&sums)[ROWS][COLUMNS], int64_t c, const Seen& seen, const F16* shrink) {
  for (int h = 0; h < ROWS; ++h) {
    for (int i = 0; i < COLUMNS; ++i) {
      float* out = seen.values(h) + c + 16 * i;
      store(out, seen.first ? sums[h][i] : fma(load(out), shrink[h], sums[h][i]));
    }
  }
}

// values[c..c + 16 COLUMNS) of ROWS query rows, shrunk, += the sum over t of numerators[h * kPositions + t] *
// values[t].
template <class T, int ROWS, int COLUMNS>
inline void weigh_columns(const float* numerators, const T* values, int64_t count, int64_t head_dim, int64_t c,
                          const Seen& seen, const F16* shrink, Ahead& next_keys) {
  Ahead ahead = next_keys;  // in registers
  const int64_t last = smaller(16, head_dim - c - 16 * (COLUMNS - 1));
  F16 sums[ROWS][COLUMNS];
  for (int h = 0; h < ROWS; ++h)
    for (int i = 0; i < COLUMNS; ++i) sums[h][i] = splat(0);
  for (int64_t t = 0; t < count; ++t) {
    ahead.fetch(kFetched<T, COLUMNS>);
#pragma GCC unroll 4
    for (int i = 0; i < COLUMNS; ++i) {
      const F16 lanes = load_values<T, COLUMNS>(values + t * head_dim + c, i, last);
      int64_t at = t;
      load_again(at);
#pragma GCC unroll 8
      for (int h = 0; h < ROWS; ++h) sums[h][i] = fma(lanes, splat(numerators[h * kPositions + at]), sums[h][i]);
    }
  }
  next_keys = ahead;
  for (int h = 0; h < ROWS; ++h)
    for (int i = 0; kPairs<T> && i + 1 < COLUMNS; i += 2) zip(&sums[h][i], &sums[h][i + 1]);
  add_columns(sums, c, seen, shrink);
}

// Two rows of values -> words [padded C / 32][32]: sixteen pairs of even columns, then of odd ones.
template <class T>
[[gnu::noinline]] void pair_values(const T* values, int64_t count, int64_t head_dim, float* words) {
  alignas(64) T none[32] = {}, above[32], below[32];
  for (int64_t t = 0; t < count; t += 2) {
    for (int64_t c = 0; c < head_dim; c += 32, words += 32) {
      const T *first = values + t * head_dim + c, *second = t + 1 < count ? first + head_dim : none;
      const int64_t n = smaller(32, head_dim - c);
      if (n < 32) {
        store(reinterpret_cast<float*>(above), splat(0));
        store(reinterpret_cast<float*>(below), splat(0));
        __builtin_memcpy(above, first, n * sizeof(T));
        __builtin_memcpy(below, second, n * sizeof(T));
        first = above, second = below;
      }
      F16 pairs[2];
      Dot<T>::stack(load_pairs(first), load_pairs(second), pairs, pairs + 1);
      store(words, pairs[0]);
      store(words + 16, pairs[1]);
    }
  }
}

// Where pairs come from: thirty-two columns of positions t and t + 1, or of t alone, as the second of a pair.
struct SharedPairs {
  const float* words;  // what `pair_values` has made for many rows
  int64_t pitch;

  void two(int64_t t, int64_t c, F16* out) const {
    out[0] = load(words + t / 2 * pitch + c);
    out[1] = load(words + t / 2 * pitch + c + 16);
  }
  void one(int64_t t, int64_t c, F16* out) const {
    two(t, c, out);
    out[0] = even(out[0]);
    out[1] = even(out[1]);
  }
};
template <class T>
struct OwnPairs {
  const T* values;  // few rows make them as they go
  int64_t head_dim;

  F16 at(int64_t t, int64_t c) const { return load_pairs(values + t * head_dim + c); }
  void two(int64_t t, int64_t c, F16* out) const { Dot<T>::stack(at(t, c), at(t + 1, c), out, out + 1); }
  void one(int64_t t, int64_t c, F16* out) const { Dot<T>::stack(splat(0), at(t, c), out, out + 1); }
};

// As `weigh_columns`, of pairs and rounded numerators.
template <class T, int ROWS, int COLUMNS, class V>
inline void weigh_pairs(const T* numerators, const V& values, int64_t count, int64_t c, const Seen& seen,
                        const F16* shrink, Ahead& next_keys) {
  using D = Dot<T>;
  Ahead ahead = next_keys;  // in registers
  F16 sums[ROWS][COLUMNS];
  for (int h = 0; h < ROWS; ++h)
    for (int i = 0; i < COLUMNS; ++i) sums[h][i] = splat(0);
  for (int64_t t = 0; t + 2 <= count; t += 2) {
    ahead.fetch(kFetched<T, COLUMNS> * 2);
#pragma GCC unroll 2
    for (int i = 0; i < COLUMNS; i += 2) {
      F16 pairs[2];
      values.two(t, c + 16 * i, pairs);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
#pragma GCC unroll 8
        for (int h = 0; h < ROWS; ++h)
          sums[h][i + j] =
              D::accumulate(sums[h][i + j], D::lanes(pairs[j]), D::lanes(splat_word(numerators + h * kPositions + t)));
    }
  }
  if (count % 2) {  // what follows the last position is another row's: it may be NaN, and even 0 times that is
    for (int i = 0; i < COLUMNS; i += 2) {
      F16 pairs[2];
      values.one(count - 1, c + 16 * i, pairs);
      for (int j = 0; j < 2; ++j)
        for (int h = 0; h < ROWS; ++h)
          sums[h][i + j] = D::accumulate(sums[h][i + j], D::lanes(pairs[j]),
                                         D::lanes(even(splat_word(numerators + h * kPositions + count - 1))));
    }
  }
  next_keys = ahead;
  add_columns(sums, c, seen, shrink);
}
