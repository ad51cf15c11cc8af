// What accept_sampled does with a stretch of one row's logits. Included inside the namespace of the instruction set.

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

// exp(logits / divisor - logsumexp), 0 where `exp` would give its least number.
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

// The arg-max over [begin, end) of noise + log max(p - q, 0), or of noise + logits / T where there is no q.
inline void pick_part(const PickArgs& a, int64_t begin, int64_t end, Pick* out) {
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
