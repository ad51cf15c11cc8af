// Sampling noise; see layerskip_kernels/_noise.py.

// log(x) for normal positive x: the exponent, and a polynomial around 1 (coefficients of Cephes' logf).
inline F16 log(F16 x) {
  F16 exponent;
  const F16 mantissa = split(x, &exponent), root = splat(1.41421356f);
  const F16 r = less(root, mantissa, mantissa * splat(0.5f), mantissa) - splat(1);
  exponent = exponent + less(root, mantissa, splat(1), splat(0));
  F16 p = splat(7.0376836292e-2f);
  p = fma(p, r, splat(-1.1514610310e-1f));
  p = fma(p, r, splat(1.1676998740e-1f));
  p = fma(p, r, splat(-1.2420140846e-1f));
  p = fma(p, r, splat(1.4249322787e-1f));
  p = fma(p, r, splat(-1.6668057665e-1f));
  p = fma(p, r, splat(2.0000714765e-1f));
  p = fma(p, r, splat(-2.4999993993e-1f));
  p = fma(p, r, splat(3.3333331174e-1f));
  const F16 square = r * r;
  p = fma(exponent, splat(-2.12194440e-4f), p * r * square);
  p = fma(square, splat(-0.5f), p);
  return fma(exponent, splat(0.693359375f), r + p);
}

// (word + 1/2) 2^-32 of the first word of Philox4x32-10 (Salmon et al. 2011) with counter (token, offset, stream).
inline F16 uniform(U16 token, int64_t seed, int64_t offset, uint32_t stream) {
  U16 a = token, b = words(static_cast<uint32_t>(offset)), c = words(static_cast<uint32_t>(offset >> 32));
  U16 d = words(stream);
  uint32_t key_a = static_cast<uint32_t>(seed), key_b = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key_a += 0x9e3779b9u, key_b += 0xbb67ae85u) {
    U16 high_a, low_a, high_c, low_c;
    multiply(a, 0xd2511f53u, &high_a, &low_a);
    multiply(c, 0xcd9e8d57u, &high_c, &low_c);
    a = high_c ^ b ^ words(key_a);
    b = low_c;
    c = high_a ^ d ^ words(key_b);
    d = low_a;
  }
  return (to_floats(a) + splat(0.5f)) * splat(0x1p-32f);
}

// -log E with E = -log(1 - u). Below 2^-10, log(1 - u) loses digits, and u + u^2/2 is exact in fp32.
inline F16 gumbel(U16 token, const NoiseKey& noise) {
  const F16 u = uniform(token, noise.seed, noise.offset, noise.stream);
  const F16 small = fma(u * splat(0.5f), u, u);
  const F16 large = splat(0) - log(max(splat(1) - u, splat(0x1p-24f)));  // u may round to 1
  return splat(0) - log(less(u, splat(0x1p-10f), small, large));
}

inline float uniform_of(const NoiseKey& noise) {
  alignas(64) float out[16];
  store(out, uniform(words(0), noise.seed, noise.offset, noise.stream), 16);
  return out[0];
}

// The tokens of sixteen vocabulary rows, of which `n` exist.
inline U16 tokens_of(int64_t row, int64_t n, const int64_t* token_map) {
  alignas(64) uint32_t out[16] = {};
  if (!token_map) {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint32_t>(row) + i;
  } else if (n == 16) {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint32_t>(token_map[row + i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint32_t>(token_map[row + i]);
  }
  return load_words(out);
}

// Updates the best score and its row; ties keep the lower row.
inline void keep_best(F16 scores, int64_t n, int64_t row, ScoredRow& pick) {
  alignas(64) float lane[16];
  if (n < 16) {
    store(lane, scores, 16);
    for (int64_t i = n; i < 16; ++i) lane[i] = -__builtin_inff();
    scores = load(lane);
  }
  if (!(lane_max(scores) > pick.score)) return;
  store(lane, scores, 16);
  for (int64_t i = 0; i < n; ++i)
    if (lane[i] > pick.score) pick = {lane[i], row + i};
}
