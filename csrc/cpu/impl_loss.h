// Softmax and cross-entropy of a row of a tile of logits, in place.

// The n entries of a row from i on, padded with the row's first entry, which does not change the maximum.
template <class T>
inline F16 load_tail(const T* row, int64_t i, int64_t n) {
  T lanes[16];
  for (int64_t j = 0; j < 16; ++j) lanes[j] = j < n ? row[i + j] : row[0];
  return load(lanes);
}

template <class T>
inline float row_max(const T* row, int64_t count) {
  F16 top = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) top = max(top, load(row + i));
  if (i < count) top = max(top, load_tail(row, i, count - i));
  return lane_max(top);
}

template <class T>
inline float entry(const T* row, int64_t i) {
  float lanes[16];
  store(lanes, load(row + i, 1));
  return lanes[0];
}

// Changes a row's shift to `top`, and rescales its sums.
inline void raise_shift(const LossSums& sums, float top) {
  float lanes[16];
  store(lanes, exp(splat(*sums.shift - top)));
  *sums.shift = top;
  *sums.sum *= lanes[0];
  for (int64_t i = 0; i < sums.hidden_size; i += 16) {
    const int64_t n = smaller(16, sums.hidden_size - i);
    store(sums.slope + i, load(sums.slope + i, n) * splat(lanes[0]), n);
  }
}

// Replaces the logits by e = exp(logit - shift) and adds Σ e to the sum. First raises the shift to the row's maximum,
// if that exceeds it by more than `slack`.
template <class T>
void loss_terms(const LossRow<T>& row, float slack, const LossSums& sums) {
  if (0 <= row.label && row.label < row.count) *sums.label_logit = entry(row.logits, row.label);
  const float top = row_max(row.logits, row.count);
  if (top > *sums.shift + slack) raise_shift(sums, top);
  const F16 shift = splat(*sums.shift);
  F16 added = splat(0);
  int64_t i = 0;
  for (; i + 16 <= row.count; i += 16) {
    const F16 e = exp(load(row.logits + i) - shift);
    added = added + e;
    store(row.logits + i, e);
  }
  float sum = total(added);
  if (i < row.count) {
    const F16 e = exp(load(row.logits + i, row.count - i) - shift);
    float lanes[16];
    store(lanes, e);
    for (int64_t j = 0; j < row.count - i; ++j) sum += lanes[j];
    store(row.logits + i, e, row.count - i);
  }
  *sums.sum += sum;
}

// Replaces the logits by the gradient of scale * cross-entropy: scale * (exp(logit - logsumexp) - [label]).
template <class T>
void loss_slopes(const LossRow<T>& row, float logsumexp, float scale) {
  const bool here = 0 <= row.label && row.label < row.count;
  const float chosen = here ? entry(row.logits, row.label) : 0;
  const F16 shift = splat(logsumexp), factor = splat(scale);
  for (int64_t i = 0; i < row.count; i += 16) {
    const int64_t n = smaller(16, row.count - i);
    store(row.logits + i, exp(load(row.logits + i, n) - shift) * factor, n);
  }
  if (here) store(row.logits + row.label, (exp(splat(chosen) - shift) - splat(1)) * factor, 1);
}
