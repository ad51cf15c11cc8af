// Attention of the query heads that share one key/value head, over one split of the positions, and the ordered
// combination of splits.

// A split is processed tile by tile. The keys of a tile are transposed once for all query rows, so that both products,
// queries times keys and weights times values, are sums of vectors times scalars, and no sum crosses lanes. Each sum
// stays in one register over the columns of a head or the positions, whatever the blocking.

// Query rows at once, and groups of sixteen keys or columns at once: as many sums as fit the registers, and enough to
// hide each other's latency.
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
constexpr int64_t kPositions = 64;  // positions of a tile
constexpr int64_t kLine = 64;       // bytes
// Cache lines to prefetch per step of COLUMNS columns.
template <class T, int COLUMNS>
constexpr int64_t kFetched = COLUMNS * sizeof(T) >= 8 ? 2 : 1;

// Whether two T are read as one word and separated into even and odd ones when they are widened.
template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;

// Whether values are multiplied in pairs of positions; the softmax numerators are then rounded to T.
template <class T>
constexpr bool kWeighsPairs = kPairs<T> && Dot<T>::kStep == 32;

// Prefetches memory in order, spread over the work before it: bursts of requests, or two alternating streams, are
// slower than the hardware prefetcher. It prefetches into L1, although a tile of wide heads fills that: one row takes 2
// to 10 % less time than with L2 on Zen 5, with heads of 64, 128 and 256 columns.
class Prefetcher {
 public:
  template <class T>
  Prefetcher(const T* from, int64_t count)
      : at_(reinterpret_cast<const char*>(from)), end_(reinterpret_cast<const char*>(from + count)) {}

  void fetch(int64_t lines) {
    if (at_ >= end_) return;
    for (int64_t i = 0; i < lines; ++i, at_ += kLine) __builtin_prefetch(at_);
  }

 private:
  const char *at_, *end_;
};

// Transposes sixteen keys into words [padded C / numbers per word][kPositions], sixteen of each row.
template <class T>
inline void transpose_keys(const T* const* keys, int64_t head_dim, float* words, Prefetcher& prefetch_values) {
  constexpr bool kWidens = sizeof(T) == 2 && !kPairs<T>;
  constexpr int64_t kStep = kWidens ? 16 : 64 / sizeof(T);
  alignas(64) float padded[16][16];
  const float* rows[16];
  for (int64_t c = 0; c < head_dim; c += kStep, words += 16 * kPositions) {
    const int64_t n = smaller(kStep, head_dim - c);
    prefetch_values.fetch(4 * kFetched<T, kColumns<kRowsAtOnce>>);
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

// One word of numbers in all sixteen lanes.
template <class X>
inline F16 splat_word(const X* from) {
  float word;
  __builtin_memcpy(&word, from, sizeof(word));
  return splat(word);
}

// Forces a reload at `index` for each column: keeping the value would spill a sum.
inline void force_reload([[maybe_unused]] int64_t& index) {
#if LSK_MAX_BLOCK <= 2
  asm volatile("" : "+r"(index));
#endif
}

// Numbers of a word that are separated and multiplied in turn; and one of them.
template <class T>
constexpr int kWordParts = kPairs<T> && Dot<T>::kStep == 16 ? 2 : 1;
template <class T>
inline F16 part_of(F16 words, int part) {
  if constexpr (kWordParts<T> == 1) return words;
  return part == 0 ? even(words) : odd(words);
}

// scores[h * kPositions + t] = queries[h] · key t, for ROWS query rows and 16 COLUMNS keys from t on. fp32 is summed
// in short pieces, which reduces the rounding error; 16-bit types do not need it.
template <class T, int ROWS, int COLUMNS>
inline void score_columns(const typename Dot<T>::X* const* queries, const float* words, int64_t width, int64_t t,
                          Prefetcher& prefetch_values, float* scores) {
  using D = Dot<T>;
  constexpr int64_t kPiece = sizeof(T) == 4 ? 8 : kMaxHead;
  Prefetcher ahead = prefetch_values;  // in registers
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
          force_reload(at);
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
  prefetch_values = ahead;
}

// Online softmax of query rows over a split: each is a row of AttentionArgs' `partial`.
struct RunningSoftmax {
  float* rows;
  int64_t pitch;
  bool first;  // no tile processed yet

  float* max(int h) const { return rows + h * pitch; }
  float* sums(int h) const { return rows + h * pitch + 16; }
  float* values(int h) const { return rows + h * pitch + kPartialHead; }
};

// Updates the maxima with `count` scores. The sums so far must be multiplied by `shrink`. Here and below, rows are
// processed together to hide latency.
template <int ROWS>
inline void raise_maxima(float* scores, int64_t count, float scale, const RunningSoftmax& seen, F16* best,
                         F16* shrink) {
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

// Turns scores of `count` keys into softmax numerators in place, and updates their sums.
template <int ROWS>
inline void softmax_numerators(float* scores, int64_t count, float scale, const RunningSoftmax& seen, F16* shrink) {
  F16 best[ROWS], sums[ROWS];
  raise_maxima<ROWS>(scores, count, scale, seen, best, shrink);
  for (int h = 0; h < ROWS; ++h) sums[h] = seen.first ? splat(0) : load(seen.sums(h)) * shrink[h];
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t n = smaller(16, count - t);
    for (int h = 0; h < ROWS; ++h) {
      float* row = scores + h * kPositions + t;
      F16 numerators = exp(fma(load(row), splat(scale), splat(0) - best[h]));
      store(row, numerators);
      if (n < 16) numerators = load(row, n);  // exp of the padding is tiny, not zero
      sums[h] = sums[h] + numerators;
    }
  }
  for (int h = 0; h < ROWS; ++h) store(seen.sums(h), sums[h]);
}

// The same, rounded to T and zero-padded to a multiple of 32: numerators[h * kPositions + t].
template <class T, int ROWS>
inline void rounded_numerators(float* scores, int64_t count, float scale, const RunningSoftmax& seen, F16* shrink,
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

// The i-th of COLUMNS groups of sixteen values of one position; the last group has `last` values. If T is read in
// pairs, the even ones of 32 come first, then the odd ones, which halves the work.
template <class T, int COLUMNS>
inline F16 load_values(const T* row, int i, int64_t last) {
  if constexpr (kPairs<T> && COLUMNS > 1) {
    const F16 words = load_pairs(row + i / 2 * 32);
    return i % 2 == 0 ? even(words) : odd(words);
  } else {
    return i < COLUMNS - 1 || last == 16 ? load(row + 16 * i) : load(row + 16 * i, last);
  }
}

// Adds these sums to the rescaled running values of some columns.
template <int ROWS, int COLUMNS>
inline void add_columns(const F16 (&sums)[ROWS][COLUMNS], int64_t c, const RunningSoftmax& seen, const F16* shrink) {
  for (int h = 0; h < ROWS; ++h) {
    for (int i = 0; i < COLUMNS; ++i) {
      float* out = seen.values(h) + c + 16 * i;
      store(out, seen.first ? sums[h][i] : fma(load(out), shrink[h], sums[h][i]));
    }
  }
}

// values[c..c + 16 COLUMNS) of ROWS query rows = shrink * values + sum over t of numerators[h * kPositions + t] *
// values[t].
template <class T, int ROWS, int COLUMNS>
inline void weigh_columns(const float* numerators, const T* values, int64_t count, int64_t head_dim, int64_t c,
                          const RunningSoftmax& seen, const F16* shrink, Prefetcher& next_keys) {
  Prefetcher ahead = next_keys;  // in registers
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
      force_reload(at);
#pragma GCC unroll 8
      for (int h = 0; h < ROWS; ++h) sums[h][i] = fma(lanes, splat(numerators[h * kPositions + at]), sums[h][i]);
    }
  }
  next_keys = ahead;
  for (int h = 0; h < ROWS; ++h)
    for (int i = 0; kPairs<T> && i + 1 < COLUMNS; i += 2) zip(&sums[h][i], &sums[h][i + 1]);
  add_columns(sums, c, seen, shrink);
}

// Interleaves pairs of positions into words [padded C / 32][32]: sixteen pairs of even columns, then of odd ones.
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

// Sources of pairs: 32 columns of positions t and t + 1, or of t alone as the second of a pair.
struct SharedPairs {
  const float* words;  // from `pair_values`, for many rows
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
  const T* values;  // few rows build pairs on the fly
  int64_t head_dim;

  F16 at(int64_t t, int64_t c) const { return load_pairs(values + t * head_dim + c); }
  void two(int64_t t, int64_t c, F16* out) const { Dot<T>::stack(at(t, c), at(t + 1, c), out, out + 1); }
  void one(int64_t t, int64_t c, F16* out) const { Dot<T>::stack(splat(0), at(t, c), out, out + 1); }
};

// As `weigh_columns`, with pairs and rounded numerators.
template <class T, int ROWS, int COLUMNS, class V>
inline void weigh_pairs(const T* numerators, const V& values, int64_t count, int64_t c, const RunningSoftmax& seen,
                        const F16* shrink, Prefetcher& next_keys) {
  using D = Dot<T>;
  Prefetcher ahead = next_keys;  // in registers
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
  if (count % 2) {  // memory after the last position may hold NaN, and 0 * NaN is NaN
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

// One tile of keys and values.
template <class T>
struct Tile {
  using X = typename Dot<T>::X;
  const float* words;  // the keys, transposed
  const T* values;     // [kPositions, C]
  float* pairs;        // memory for the values in pairs, if many rows use them, else null
  int64_t unpaired;    // values not yet stored there: done after the first scores, while they are being prefetched
  int64_t head_dim;
  Prefetcher &prefetch_values, &next_keys;

  // For ROWS query rows that all see `count` positions of the tile.
  template <int ROWS>
  void attend(const X* const* queries, int64_t count, const RunningSoftmax& seen) {
    constexpr int kWide = kColumns<ROWS>;
    alignas(64) float scores[ROWS * kPositions];
    const int64_t width = head_dim * 16 / Dot<T>::kStep / kWordParts<T>;
    int64_t t = 0, c = 0;
    for (; t + 16 * kWide <= count; t += 16 * kWide)
      score_columns<T, ROWS, kWide>(queries, words, width, t, prefetch_values, scores);
    for (; t < count; t += 16) score_columns<T, ROWS, 1>(queries, words, width, t, prefetch_values, scores);
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

  void attend(int rows, const X* const* queries, int64_t count, const RunningSoftmax& seen) {
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

// The tile at `start` for all query rows, row = m * ratio + head; `first`: the first tile of its split. Consecutive
// rows that see the same positions are processed together.
template <class T>
inline void attend_tile(const AttentionArgs<T>& a, int64_t start, bool first, const T* next) {
  using X = typename Dot<T>::X;
  const auto visible = [&](int64_t row) {
    const int64_t seen = a.length + row / a.ratio + 1 - start;
    return seen < 0 ? 0 : smaller(seen, kPositions);
  };
  alignas(64) float words[kMaxHead * kPositions];
  alignas(64) X converted[kRowsAtOnce * kMaxHead];  // if T is converted before the product
  const X* queries[kRowsAtOnce];
  const int64_t rows = a.rows * a.ratio, pitch = partial_pitch(a.head_dim), last = visible(rows - 1);
  Prefetcher prefetch_values(a.values + start * a.head_dim, last * a.head_dim),
      next_keys(next, kPositions * a.head_dim);
  for (int64_t t = 0; t < last; t += 16) {
    const T* keys[16];  // repeats the last one at the end
    for (int64_t i = 0; i < 16; ++i) keys[i] = a.keys + (start + smaller(t + i, last - 1)) * a.head_dim;
    transpose_keys(keys, a.head_dim, words + t, prefetch_values);
  }
  alignas(64) float pairs[kWeighsPairs<T> ? kMaxHead * kPositions / 2 : 1];
  const T* values = a.values + start * a.head_dim;
  const bool shared = rows > 2 * kRowsAtOnce || a.head_dim % 32;  // building pairs twice is cheaper than storing them
  Tile<T> tile = {words, values, shared ? pairs : nullptr, last, a.head_dim, prefetch_values, next_keys};
  for (int64_t r = 0; r < rows;) {
    const int64_t count = visible(r);
    int block = 0;
    for (; block < kRowsAtOnce && r + block < rows && visible(r + block) == count; ++block) {
      const int64_t row = r + block, m = row / a.ratio, head = a.kv_head * a.ratio + row % a.ratio;
      const T* query = a.q + (m * a.num_heads + head) * a.head_dim;
      if constexpr (sizeof(T) == sizeof(X)) {
        queries[block] = query;
      } else {
        X* own = converted + block * kMaxHead;
        tile_row<T, X>(query, nullptr, 0.0f, a.head_dim, own);
        queries[block] = own;
      }
    }
    const RunningSoftmax seen = {a.partial + r * pitch, pitch, first};
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

// Merges a row's result of a split into that of the splits before it; the larger maximum stays.
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

// Combines the splits of one query row, `stride` floats apart.
template <class T>
void combine(const float* partial, int64_t stride, int64_t splits, int64_t head_dim, T* out) {
  alignas(64) float whole[kPartialHead + kMaxHead];
  __builtin_memcpy(whole, partial, partial_pitch(head_dim) * sizeof(float));
  for (int64_t s = 1; s < splits; ++s) merge(partial + s * stride, head_dim, whole);
  finish(whole, head_dim, out);
}

// All splits of rows [0, M) in turn, with memory for two of them.
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
