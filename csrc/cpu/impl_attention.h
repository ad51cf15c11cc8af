// Attention of the query heads that share one key/value head, over one split of the positions, and the ordered
// combination of splits. Included inside the namespace of the instruction set.

// A split is read tile by tile. A tile's keys are transposed once, for all query rows, so that both products, of
// queries and keys and of weights and values, are sums of vectors times a number: no sum across the lanes of a
// register. Each sum runs in one register over the columns of a head or the positions, whatever the blocking around it.

// Query rows at once, and how many times sixteen keys or columns of a head beside each other: as many sums as there are
// registers for, and enough of them to hide each other's latency.
#if LSK_MAX_BLOCK > 2
constexpr int kRowsAtOnce = LSK_MAX_BLOCK;
template <int ROWS>
constexpr int kColumns = 4;
#else
constexpr int kRowsAtOnce = 3;
template <int ROWS>
constexpr int kColumns = ROWS == 1 ? 4 : 2;
#endif
constexpr int64_t kMaxHead = 256;
constexpr int64_t kLine = 64;  // bytes
// Lines that are fetched ahead beside a step of so many columns.
template <class T, int COLUMNS>
constexpr int64_t kFetched = COLUMNS * sizeof(T) >= 8 ? 2 : 1;

// Whether two of T are read as one word, the even one and the odd one, where they are widened to be multiplied.
template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;

// What is read next, fetched in order and spread over the work before it: a burst of requests, or two streams in turn,
// come slower than a processor's own prefetcher. It goes into the first-level cache, though a tile of wide heads fills
// that: against the second level alone, one row takes 2 to 10 % less on Zen 5, with heads of 64, 128 and 256 columns.
class Ahead {
 public:
  template <class T>
  Ahead(const T* from, int64_t count)
      : at_(reinterpret_cast<const char*>(from)), end_(reinterpret_cast<const char*>(from + count)) {}

  void fetch(int64_t lines) {
    if (at_ >= end_) return;
    for (int64_t i = 0; i < lines; ++i, at_ += kLine) __builtin_prefetch(at_);
  }

 private:
  const char *at_, *end_;
};

// Sixteen keys -> words [padded C / numbers a word][kTile], sixteen of each row. A word holds as many numbers as fit.
template <class T>
inline void transpose_keys(const T* const* keys, int64_t head_dim, float* words, Ahead& own_values) {
  constexpr bool kWidens = sizeof(T) == 2 && !kPairs<T>;
  constexpr int64_t kStep = kWidens ? 16 : 64 / sizeof(T);
  alignas(64) float padded[16][16];
  const float* rows[16];
  for (int64_t c = 0; c < head_dim; c += kStep, words += 16 * kTile) {
    const int64_t n = smaller(kStep, head_dim - c);
    own_values.fetch(4 * kFetched<T, kColumns<kRowsAtOnce>>);
    for (int i = 0; i < 16; ++i) {
      rows[i] = kWidens || n < kStep ? padded[i] : reinterpret_cast<const float*>(keys[i] + c);
      if constexpr (kWidens) {
        store(padded[i], n < kStep ? load(keys[i] + c, n) : load(keys[i] + c));
      } else if (n < kStep) {
        store(padded[i], splat(0));
        __builtin_memcpy(padded[i], keys[i] + c, n * sizeof(T));
      }
    }
    transpose(rows, words, kTile);
  }
}

// One number, or as many as a word holds, in all sixteen lanes.
template <class X>
inline F16 splat_word(const X* from) {
  float word;
  __builtin_memcpy(&word, from, sizeof(word));
  return splat(word);
}

// Has what lies at `index` loaded again for each column: kept for the next one, it would push a sum out of the
// registers.
inline void load_again([[maybe_unused]] int64_t& index) {
#if LSK_MAX_BLOCK <= 2
  asm volatile("" : "+r"(index));
#endif
}

// How many numbers of a word are taken apart, to be multiplied one after the other, and one of them.
template <class T>
constexpr int kWordParts = kPairs<T> && Dot<T>::kStep == 16 ? 2 : 1;
template <class T>
inline F16 part_of(F16 words, int part) {
  if constexpr (kWordParts<T> == 1) return words;
  return part == 0 ? even(words) : odd(words);
}

// scores[h * kTile + t] = queries[h] · key t, for ROWS query rows and sixteen COLUMNS keys from t on. fp32 is summed in
// short pieces, which rounds less; products of 16 bits are exact, and what is rounded to 16 bits later needs none.
template <class T, int ROWS, int COLUMNS>
inline void score_columns(const typename Dot<T>::X* const* queries, const float* words, int64_t width, int64_t t,
                          Ahead& own_values, float* scores) {
  using D = Dot<T>;
  constexpr int64_t kPiece = sizeof(T) == 4 ? 8 : kMaxHead;
  Ahead ahead = own_values;  // in registers
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    F16 sums[ROWS][COLUMNS];
    for (int h = 0; h < ROWS; ++h)
      for (int i = 0; i < COLUMNS; ++i) sums[h][i] = splat(0);
    for (int64_t c = begin; c < smaller(begin + kPiece, width); ++c) {
      ahead.fetch(kFetched<T, COLUMNS> * kWordParts<T>);
#pragma GCC unroll 2
      for (int part = 0; part < kWordParts<T>; ++part) {
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; ++i) {
          const auto keys = D::lanes(part_of<T>(load(words + c * kTile + t + 16 * i), part));
          int64_t at = (c * kWordParts<T> + part) * (D::kStep / 16);
          load_again(at);
#pragma GCC unroll 8
          for (int h = 0; h < ROWS; ++h)
            sums[h][i] = D::accumulate(sums[h][i], keys, D::lanes(splat_word(queries[h] + at)));
        }
      }
    }
    for (int h = 0; h < ROWS; ++h) {
      for (int i = 0; i < COLUMNS; ++i) {
        float* out = scores + h * kTile + t + 16 * i;
        store(out, begin == 0 ? sums[h][i] : load(out) + sums[h][i]);
      }
    }
  }
  own_values = ahead;
}

// What query rows have seen of a split so far: each a row of AttentionArgs' `partial`.
struct Seen {
  float* rows;
  int64_t pitch;
  bool first;  // nothing yet

  float* max(int h) const { return rows + h * pitch; }
  float* sums(int h) const { return rows + h * pitch + 16; }
  float* values(int h) const { return rows + h * pitch + kPartialHead; }
};

// Scores of `count` keys -> softmax numerators, in place; maxima and sums go on. `shrink` is what the weighted values
// must be multiplied by before these are added. Step by step for all rows, so that they hide each other's latency.
template <int ROWS>
inline void softmax_numerators(float* scores, int64_t count, float scale, const Seen& seen, F16* shrink) {
  F16 best[ROWS], sums[ROWS];
  for (int h = 0; h < ROWS; ++h) {
    float* row = scores + h * kTile;
    for (int64_t i = count; i % 16; ++i) row[i] = -__builtin_inff();
    best[h] = splat(-__builtin_inff());
    for (int64_t t = 0; t < count; t += 16) best[h] = max(best[h], load(row + t));
  }
  for (int h = 0; h < ROWS; ++h) {
    const float before = seen.first ? -__builtin_inff() : *seen.max(h), own = lane_max(best[h]) * scale;
    best[h] = splat(own > before ? own : before);
    shrink[h] = splat(before) - best[h];
    *seen.max(h) = own > before ? own : before;
  }
  for (int h = 0; h < ROWS; ++h) {
    shrink[h] = exp(shrink[h]);
    sums[h] = seen.first ? splat(0) : load(seen.sums(h)) * shrink[h];
  }
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t n = smaller(16, count - t);
    for (int h = 0; h < ROWS; ++h) {
      float* row = scores + h * kTile + t;
      F16 numerators = exp(fma(load(row), splat(scale), splat(0) - best[h]));
      store(row, numerators);
      if (n < 16) numerators = load(row, n);  // exp of what pads the end is tiny, not zero
      sums[h] = sums[h] + numerators;
    }
  }
  for (int h = 0; h < ROWS; ++h) store(seen.sums(h), sums[h]);
}

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

// values[c..c + 16 COLUMNS) of ROWS query rows, shrunk, += the sum over t of numerators[h * kTile + t] * values[t].
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
      for (int h = 0; h < ROWS; ++h) sums[h][i] = fma(lanes, splat(numerators[h * kTile + at]), sums[h][i]);
    }
  }
  next_keys = ahead;
  for (int h = 0; h < ROWS; ++h) {
    for (int i = 0; kPairs<T> && i + 1 < COLUMNS; i += 2) zip(&sums[h][i], &sums[h][i + 1]);
    for (int i = 0; i < COLUMNS; ++i) {
      float* out = seen.values(h) + c + 16 * i;
      const int64_t n = i < COLUMNS - 1 ? 16 : last;
      store(out, seen.first ? sums[h][i] : fma(load(out, n), shrink[h], sums[h][i]), n);
    }
  }
}

// One tile of keys and values.
template <class T>
struct Tile {
  using X = typename Dot<T>::X;
  const float* words;  // the keys, transposed
  const T* values;     // [kTile, C]
  int64_t head_dim;
  Ahead &own_values, &next_keys;

  // For ROWS query rows, which all see `count` positions of it.
  template <int ROWS>
  void attend(const X* const* queries, int64_t count, const Seen& seen) const {
    constexpr int kWide = kColumns<ROWS>;
    alignas(64) float scores[ROWS * kTile];
    const int64_t width = head_dim * 16 / Dot<T>::kStep / kWordParts<T>;
    int64_t t = 0, c = 0;
    for (; t + 16 * kWide <= count; t += 16 * kWide)
      score_columns<T, ROWS, kWide>(queries, words, width, t, own_values, scores);
    for (; t < count; t += 16) score_columns<T, ROWS, 1>(queries, words, width, t, own_values, scores);
    F16 shrink[ROWS];
    softmax_numerators<ROWS>(scores, count, 1.0f / __builtin_sqrtf(static_cast<float>(head_dim)), seen, shrink);
    for (; c + 16 * kWide <= head_dim; c += 16 * kWide)
      weigh_columns<T, ROWS, kWide>(scores, values, count, head_dim, c, seen, shrink, next_keys);
    for (; c < head_dim; c += 16)
      weigh_columns<T, ROWS, 1>(scores, values, count, head_dim, c, seen, shrink, next_keys);
  }

  void attend(int rows, const X* const* queries, int64_t count, const Seen& seen) const {
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
    return seen < 0 ? 0 : smaller(seen, kTile);
  };
  alignas(64) float words[kMaxHead * kTile];
  alignas(64) X packed[kRowsAtOnce * kMaxHead];  // where T is not what is multiplied
  const X* queries[kRowsAtOnce];
  const int64_t rows = a.rows * a.ratio, pitch = kPartialHead + a.head_dim, last = visible(rows - 1);
  Ahead own_values(a.values + start * a.head_dim, last * a.head_dim), next_keys(next, kTile * a.head_dim);
  for (int64_t t = 0; t < last; t += 16) {
    const T* keys[16];  // the last one again where they are fewer
    for (int64_t i = 0; i < 16; ++i) keys[i] = a.keys + (start + smaller(t + i, last - 1)) * a.head_dim;
    transpose_keys(keys, a.head_dim, words + t, own_values);
  }
  const Tile<T> tile = {words, a.values + start * a.head_dim, a.head_dim, own_values, next_keys};
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
  for (int64_t start = begin; start < end; start += kTile)
    attend_tile(a, start, start == begin, start + kTile < end ? a.keys + (start + kTile) * a.head_dim : a.next_keys);
}

// One query row from its splits, `stride` floats apart: sum_s e^(max_s - max) values_s / sum_s e^(max_s - max) sum_s.
template <class T>
void combine(const float* partial, int64_t stride, int64_t splits, int64_t head_dim, T* out) {
  float maximum = partial[0];
  for (int64_t s = 1; s < splits; ++s) maximum = partial[s * stride] > maximum ? partial[s * stride] : maximum;
  alignas(64) float values[256] = {}, factors[16];
  F16 sums = splat(0);
  for (int64_t first = 0; first < splits; first += 16) {
    const int64_t count = smaller(16, splits - first);
    for (int64_t s = 0; s < count; ++s) factors[s] = partial[(first + s) * stride];
    store(factors, exp(load(factors, count) - splat(maximum)), 16);
    for (int64_t s = 0; s < count; ++s) {
      const float* split = partial + (first + s) * stride;
      sums = fma(load(split + 16), splat(factors[s]), sums);
      for (int64_t c = 0; c < head_dim; c += 16)
        store(values + c,
              fma(load(split + kPartialHead + c, smaller(16, head_dim - c)), splat(factors[s]), load(values + c)), 16);
    }
  }
  for (int64_t c = 0; c < head_dim; c += 16)
    store(out + c, load(values + c) / splat(total(sums)), smaller(16, head_dim - c));
}
