// Scores of a tile of keys, and the numerators of their softmax. Included by impl_attention.h.

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
constexpr int64_t kPositions = 64;  // of a tile
constexpr int64_t kLine = 64;       // bytes
// Lines that are fetched ahead beside a step of so many columns.
template <class T, int COLUMNS>
constexpr int64_t kFetched = COLUMNS * sizeof(T) >= 8 ? 2 : 1;

// Whether two of T are read as one word, the even one and the odd one, where they are widened to be multiplied.
template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;

// Whether values are weighed two positions at a time: then the numerators of their softmax are rounded to T.
template <class T>
constexpr bool kWeighsPairs = kPairs<T> && Dot<T>::kStep == 32;

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

// Sixteen keys -> words [padded C / numbers a word][kPositions], sixteen of each row. A word holds as many numbers as
// fit.
template <class T>
inline void transpose_keys(const T* const* keys, int64_t head_dim, float* words, Ahead& own_values) {
  constexpr bool kWidens = sizeof(T) == 2 && !kPairs<T>;
  constexpr int64_t kStep = kWidens ? 16 : 64 / sizeof(T);
  alignas(64) float padded[16][16];
  const float* rows[16];
  for (int64_t c = 0; c < head_dim; c += kStep, words += 16 * kPositions) {
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
    transpose(rows, words, kPositions);
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

// scores[h * kPositions + t] = queries[h] · key t, for ROWS query rows and sixteen COLUMNS keys from t on. fp32 is
// summed in short pieces, which rounds less; products of 16 bits are exact, and what is rounded to 16 bits later needs
// none.
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
          const auto keys = D::lanes(part_of<T>(load(words + c * kPositions + t + 16 * i), part));
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
        float* out = scores + h * kPositions + t + 16 * i;
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

// The maxima of `count` scores and of those before them. `shrink` is what the sums so far must be multiplied by. Step
// by step for all rows, here and below, so that they hide each other's latency.
template <int ROWS>
inline void raise_maxima(float* scores, int64_t count, float scale, const Seen& seen, F16* best, F16* shrink) {
  for (int h = 0; h < ROWS; ++h) {
    float* row = scores + h * kPositions;
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
  for (int h = 0; h < ROWS; ++h) shrink[h] = exp(shrink[h]);
}

// Scores of `count` keys -> softmax numerators, in place; their sums go on.
template <int ROWS>
inline void softmax_numerators(float* scores, int64_t count, float scale, const Seen& seen, F16* shrink) {
  F16 best[ROWS], sums[ROWS];
  raise_maxima<ROWS>(scores, count, scale, seen, best, shrink);
  for (int h = 0; h < ROWS; ++h) sums[h] = seen.first ? splat(0) : load(seen.sums(h)) * shrink[h];
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t n = smaller(16, count - t);
    for (int h = 0; h < ROWS; ++h) {
      float* row = scores + h * kPositions + t;
      F16 numerators = exp(fma(load(row), splat(scale), splat(0) - best[h]));
      store(row, numerators);
      if (n < 16) numerators = load(row, n);  // exp of what pads the end is tiny, not zero
      sums[h] = sums[h] + numerators;
    }
  }
  for (int h = 0; h < ROWS; ++h) store(seen.sums(h), sums[h]);
}

// The same, rounded, with zeros up to the next word of thirty-two: numerators[h * kPositions + t].
template <class T, int ROWS>
inline void rounded_numerators(float* scores, int64_t count, float scale, const Seen& seen, F16* shrink,
                               T* numerators) {
  using D = Dot<T>;
  constexpr float kLog2E = 1.44269504f;
  alignas(64) static constexpr T kOnes[2] = {{0x3f80}, {0x3f80}};
  F16 best[ROWS], sums[ROWS];
  raise_maxima<ROWS>(scores, count, scale, seen, best, shrink);
  for (int h = 0; h < ROWS; ++h) {
    sums[h] = seen.first ? splat(0) : load(seen.sums(h)) * shrink[h];
    best[h] = best[h] * splat(-kLog2E);
  }
  const F16 factor = splat(scale * kLog2E), ones = splat_word(kOnes);
  for (int64_t t = 0; t < count; t += 32) {
    for (int h = 0; h < ROWS; ++h) {
      float* row = scores + h * kPositions + t;
      F16 half[2];
      for (int i = 0; i < 2; ++i) {
        half[i] = coarse_exp2(fma(load(row + 16 * i), factor, best[h]));
        const int64_t n = count - t - 16 * i;
        if (n < 16) {
          store(row + 16 * i, half[i]);
          half[i] = load(row + 16 * i, n < 0 ? 0 : n);
        }
      }
      const F16 words = D::rounded(half[0], half[1]);
      store(reinterpret_cast<float*>(numerators + h * kPositions + t), words);
      sums[h] = D::accumulate(sums[h], D::lanes(words), D::lanes(ones));
    }
  }
  for (int h = 0; h < ROWS; ++h) store(seen.sums(h), sums[h]);
}
