// Attention of the query heads that share one key/value head, over one split of the positions, and the ordered
// combination of splits. Included inside the namespace of the instruction set.

// Softmax numerators of `count` scores, in place, their maximum and their sum.
inline void softmax_numerators(float* scores, int64_t count, float scale, float* max_out, float* sum_out) {
  F16 best = splat(-__builtin_inff());
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t n = smaller(16, count - t);
    for (int64_t i = n; i < 16; ++i) scores[t + i] = -__builtin_inff();
    const F16 scaled = load(scores + t) * splat(scale);
    store(scores + t, scaled, 16);
    best = max(best, scaled);
  }
  const float maximum = lane_max(best);
  F16 sum = splat(0);
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t n = smaller(16, count - t);
    F16 numerators = exp(load(scores + t) - splat(maximum));
    store(scores + t, numerators, 16);
    if (n < 16) numerators = load(scores + t, n);  // exp of what pads the end is tiny, not zero
    sum = sum + numerators;
  }
  *max_out = maximum;
  *sum_out = total(sum);
}

// out[h][c..c + 16 COLUMNS) = sum over t of numerators[h][t] * values[t] for ROWS query rows; the last sixteen
// columns may be fewer. Every sum has a register of its own, enough of them to hide each other's latency.
template <class T, int ROWS, int COLUMNS>
inline void weigh_columns(const float* const* numerators, const T* values, int64_t count, int64_t head_dim, int64_t c,
                          float* const* out) {
  const int64_t last = smaller(16, head_dim - c - 16 * (COLUMNS - 1));
  F16 sums[ROWS][COLUMNS];
  for (int h = 0; h < ROWS; ++h)
    for (int i = 0; i < COLUMNS; ++i) sums[h][i] = splat(0);
  for (int64_t t = 0; t < count; ++t) {
    const T* row = values + t * head_dim + c;
    F16 lanes[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i)
      lanes[i] = i < COLUMNS - 1 || last == 16 ? load(row + 16 * i) : load(row + 16 * i, last);
    for (int h = 0; h < ROWS; ++h) {
      const F16 weight = splat(numerators[h][t]);
      for (int i = 0; i < COLUMNS; ++i) sums[h][i] = fma(lanes[i], weight, sums[h][i]);
    }
  }
  for (int h = 0; h < ROWS; ++h)
    for (int i = 0; i < COLUMNS; ++i) store(out[h] + c + 16 * i, sums[h][i], i < COLUMNS - 1 ? 16 : last);
}

template <class T, int ROWS>
inline void weigh_values(const float* const* numerators, const T* values, int64_t count, int64_t head_dim,
                         float* const* out) {
  int64_t c = 0;
#if LSK_MAX_BLOCK > 2
  for (; c + 64 <= head_dim; c += 64) weigh_columns<T, ROWS, 4>(numerators, values, count, head_dim, c, out);
#endif
  for (; c < head_dim; c += 16) weigh_columns<T, ROWS, 1>(numerators, values, count, head_dim, c, out);
}

template <class T>
inline void weigh_block(int rows, const float* const* numerators, const T* values, int64_t count, int64_t head_dim,
                        float* const* out) {
  switch (rows) {
    case 1:
      return weigh_values<T, 1>(numerators, values, count, head_dim, out);
    case 2:
      return weigh_values<T, 2>(numerators, values, count, head_dim, out);
#if LSK_MAX_BLOCK > 2
    case 3:
      return weigh_values<T, 3>(numerators, values, count, head_dim, out);
    case 4:
      return weigh_values<T, 4>(numerators, values, count, head_dim, out);
    case 5:
      return weigh_values<T, 5>(numerators, values, count, head_dim, out);
    default:
      return weigh_values<T, 6>(numerators, values, count, head_dim, out);
#endif
  }
}

// One split for up to kMaxRows query rows; `first` counts them from (m = 0, head 0), row = m * ratio + head.
template <class T>
inline void attend_rows(const AttentionArgs<T>& a, int64_t split, int64_t first, int64_t rows) {
  using X = typename Dot<T>::X;
  static_assert(kSplit == kTile, "the scores of a split are one tile of dot products");
  const int64_t start = split * kSplit, stride = padded(a.head_dim);
  const auto visible = [&](int64_t row) {
    const int64_t seen = a.length + row / a.ratio + 1 - start;
    return seen < 0 ? 0 : smaller(seen, kSplit);
  };
  alignas(64) X queries[kMaxRows * 256];
  alignas(64) float scores[kMaxRows * kTile];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = (first + r) / a.ratio, head = a.kv_head * a.ratio + (first + r) % a.ratio;
    pack_row<T, X>(a.q + (m * a.num_heads + head) * a.head_dim, nullptr, 0.0f, a.head_dim, queries + r * stride);
  }
  const T *keys = a.keys + start * a.head_dim, *values = a.values + start * a.head_dim;
  dot_tile(keys, a.head_dim, visible(first + rows - 1), queries, stride, rows, a.head_dim, values, scores);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.head_dim));
  const int64_t pitch = a.head_dim + 2;
  for (int64_t r = 0; r < rows;) {
    const int64_t count = visible(first + r);
    const float* numerators[LSK_MAX_BLOCK];
    float* out[LSK_MAX_BLOCK];
    int block = 0;  // rows that see equally far, so that each value is loaded once for all of them
    for (; block < LSK_MAX_BLOCK && r + block < rows && visible(first + r + block) == count; ++block) {
      float* partial = a.partial + (first + r + block) * pitch;
      softmax_numerators(scores + (r + block) * kTile, count, scale, partial, partial + 1);
      numerators[block] = scores + (r + block) * kTile;
      out[block] = partial + 2;
    }
    weigh_block(block, numerators, values, count, a.head_dim, out);
    r += block;
  }
}

template <class T>
void attend(const AttentionArgs<T>& a, int64_t split) {
  for (int64_t first = 0; first < a.rows * a.ratio; first += kMaxRows)
    attend_rows(a, split, first, smaller(kMaxRows, a.rows * a.ratio - first));
}

// One query row from its splits, `stride` floats apart: sum_s e^(max_s - max) values_s / sum_s e^(max_s - max) sum_s.
template <class T>
void combine(const float* partial, int64_t stride, int64_t splits, int64_t head_dim, T* out) {
  float maximum = partial[0];
  for (int64_t s = 1; s < splits; ++s) maximum = partial[s * stride] > maximum ? partial[s * stride] : maximum;
  alignas(64) float values[256] = {}, factors[16];
  float sum = 0;
  for (int64_t first = 0; first < splits; first += 16) {
    const int64_t count = smaller(16, splits - first);
    for (int64_t s = 0; s < count; ++s) factors[s] = partial[(first + s) * stride];
    store(factors, exp(load(factors, count) - splat(maximum)), 16);
    for (int64_t s = 0; s < count; ++s) {
      const float* split = partial + (first + s) * stride;
      sum += factors[s] * split[1];
      for (int64_t c = 0; c < head_dim; c += 16)
        store(values + c, fma(load(split + 2 + c, smaller(16, head_dim - c)), splat(factors[s]), load(values + c)), 16);
    }
  }
  for (int64_t c = 0; c < head_dim; c += 16) store(out + c, load(values + c) / splat(sum), smaller(16, head_dim - c));
}
