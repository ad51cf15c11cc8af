// The exit head over a range of the vocabulary, and the reductions of accept_sampled.

// Folds `count` logits, the first of which is vocabulary row `row`, into the running maximum and sum.
inline void fold_logits(float* logits, int64_t count, int64_t row, HeadPartial& partial) {
  for (int64_t i = count; i % 16; ++i) logits[i] = -__builtin_inff();
  F16 best = load(logits);
  for (int64_t i = 16; i < count; i += 16) best = max(best, load(logits + i));
  const float block_max = lane_max(best);
  if (block_max > partial.max) {
    partial.sum *= __builtin_expf(partial.max - block_max);
    partial.max = block_max;
    for (int64_t i = 0; i < count; ++i) {
      if (logits[i] == block_max) {
        partial.row = row + i;
        break;
      }
    }
  }
  // If all logits so far are -inf, -inf - -inf would turn the sum into NaN.
  const F16 shift = splat(partial.max > -__builtin_inff() ? partial.max : 0.0f);
  F16 sum = splat(0);
  for (int64_t i = 0; i < count; i += 16) sum = sum + exp(load(logits + i) - shift);
  partial.sum += total(sum);
}

// Samples among `count` logits, the first of which is vocabulary row `row`.
inline void draw(const float* logits, int64_t count, int64_t row, const int64_t* token_map, const NoiseKey& noise,
                 HeadPartial& partial) {
  const int64_t before = partial.pick.row;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = smaller(16, count - i);
    keep_best(load(logits + i) + gumbel(tokens_of(row + i, n, token_map), noise), n, row + i, partial.pick);
  }
  if (partial.pick.row != before) partial.logit = logits[partial.pick.row - row];
}

// As fold_logits, with the row's options: writes the logits, and samples.
inline void fold_with_options(const HeadOptions& options, float* logits, int64_t count, int64_t row, int64_t r,
                              HeadPartial& partial) {
  if (options.logits) __builtin_memcpy(options.logits + r * options.pitch + row, logits, count * sizeof(float));
  const float temperature = options.temperature ? options.temperature[r] : 0.0f;
  if (temperature > 0)
    for (int64_t i = 0; i < count; i += 16) store(logits + i, load(logits + i) / splat(temperature), 16);
  fold_logits(logits, count, row, partial);
  if (temperature > 0)
    draw(logits, count, row, options.token_map, {options.seed[r], options.offset[r], kDraft}, partial);
}

// partial[r] for the activation row r, over the vocabulary rows [begin, end).
template <class T>
void head(const HeadArgs& a, int64_t begin, int64_t end, HeadPartial* partial) {
  alignas(64) float tile[kMaxRows * kTile];
  for (int64_t r = 0; r < a.x.rows; ++r)
    partial[r] = {-__builtin_inff(), 0.0f, begin, {-__builtin_inff(), begin - 1}, 0.0f};
  for_each_tile(a.x, begin, end, [&](int64_t n, int64_t count, int64_t m, int64_t rows) {
    multiply_tile<T>(a.weight, n, count, a.x, m, rows, a.weight.row(n + count), tile);
    for (int64_t r = 0; r < rows; ++r) {
      float* logits = tile + r * kTile;
      if (a.scale)
        for (int64_t i = 0; i < count; ++i) logits[i] *= a.scale[n + i];
      if (a.options) {
        fold_with_options(*a.options, logits, count, n, m + r, partial[m + r]);
      } else {
        fold_logits(logits, count, n, partial[m + r]);
      }
    }
  });
}

// Maximum, its row and the sum of exponentials of logits / divisor over [begin, end).
inline void softmax_part(const float* logits, float divisor, int64_t begin, int64_t end, HeadPartial* out) {
  alignas(64) float tile[kTile];
  *out = {-__builtin_inff(), 0.0f, begin, {}, 0.0f};
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t count = smaller(kTile, end - n);
    for (int64_t i = 0; i < count; i += 16)
      store(tile + i, load(logits + n + i, smaller(16, count - i)) / splat(divisor), 16);
    fold_logits(tile, count, n, *out);
  }
}

// exp(logits / divisor - logsumexp), and 0 where `exp` would return its minimum.
inline F16 probabilities(F16 logits, float divisor, float logsumexp) {
  const F16 x = logits / splat(divisor) - splat(logsumexp);
  return less(x, splat(-87.0f), splat(0), exp(x));
}

inline void softmax(const float* logits, float divisor, float logsumexp, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = smaller(16, count - i);
    store(out + i, probabilities(load(logits + i, n), divisor, logsumexp), n);
  }
}

// The arg-max over [begin, end) of noise + log max(p - q, 0); without q, of noise + logits / T.
inline void sample_part(const SampleArgs& a, int64_t begin, int64_t end, ScoredRow* out) {
  *out = {-__builtin_inff(), begin};
  for (int64_t v = begin; v < end; v += 16) {
    const int64_t n = smaller(16, end - v);
    const F16 noise = gumbel(tokens_of(v, n, nullptr), a.noise), logits = load(a.logits + v, n);
    F16 scores = logits / splat(a.temperature);
    if (a.q) {
      const F16 rest = probabilities(logits, a.temperature, a.logsumexp) - load(a.q + v, n);
      const F16 least = splat(0x1p-126f);
      scores = less(rest, least, splat(-__builtin_inff()), log(max(least, rest)));
    }
    keep_best(scores + noise, n, v, *out);
  }
}
