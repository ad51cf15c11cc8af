// The exit head over a range of the vocabulary. Included inside the namespace of the instruction set.

// Folds `count` logits, whose first row is `row`, into the running maximum and sum.
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
  // Where all is -inf so far, -inf - -inf would make a NaN of a sum that should stay near zero.
  const F16 shift = splat(partial.max > -__builtin_inff() ? partial.max : 0.0f);
  F16 sum = splat(0);
  for (int64_t i = 0; i < count; i += 16) sum = sum + exp(load(logits + i) - shift);
  partial.sum += total(sum);
}

// Draws among `count` logits of one row, whose first vocabulary row is `row`.
inline void draw(const float* logits, int64_t count, int64_t row, const int64_t* token_map, const NoiseKey& noise,
                 HeadPartial& partial) {
  const int64_t before = partial.pick.row;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = smaller(16, count - i);
    keep_best(load(logits + i) + gumbel(tokens_of(row + i, n, token_map), noise), n, row + i, partial.pick);
  }
  if (partial.pick.row != before) partial.logit = logits[partial.pick.row - row];
}

// The options of one row beyond the maximum and the sum of its logits: where they are written, how one is drawn.
inline void fold_asked(const HeadOptions& options, float* logits, int64_t count, int64_t row, int64_t r,
                       HeadPartial& partial) {
  if (options.logits) __builtin_memcpy(options.logits + r * options.pitch + row, logits, count * sizeof(float));
  const float temperature = options.temperature ? options.temperature[r] : 0.0f;
  if (temperature > 0)
    for (int64_t i = 0; i < count; i += 16) store(logits + i, load(logits + i) / splat(temperature), 16);
  fold_logits(logits, count, row, partial);
  if (temperature > 0)
    draw(logits, count, row, options.token_map, {options.seed[r], options.offset[r], kDraw}, partial);
}

// partial[r] for the packed row r, over the vocabulary rows [begin, end).
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
        fold_asked(*a.options, logits, count, n, m + r, partial[m + r]);
      } else {
        fold_logits(logits, count, n, partial[m + r]);
      }
    }
  });
}
