// Dot products of packed integer weights with bf16 activations, which are quantized to 16-bit integers with one scale
// per row.

// Integer products are summed exactly within a group, then converted and scaled: two instructions per register of
// weights, where fp32 takes four. An activation loses about 2^-16 of the row's largest one; rounding to bf16 has lost
// 2^-9 of its value. Each lane adds its groups in order, whatever the blocking, so results do not depend on the number
// of rows.

using FixedRow = IntegerRow<int16_t, float>;  // sums: a block's sum / kSumLanes

constexpr float kSumLanes =
    sizeof(Floats) / sizeof(float);  // lanes of a row's sum; each adds its part of the group minimum

// Quantizes a zero-padded fp32 row in place. NaN and infinity make the scale NaN.
inline void quantize_row(float* row, int64_t padded_width) {
  const IntegerScale own(row, padded_width, 32767.0f);
  float* sums = row + padded_width / 2;
  int16_t* out = reinterpret_cast<int16_t*>(row);
  for (int64_t k = 0; k < padded_width; k += kBlock) store_block(row + k, own.inverse, out + k);
  for (int64_t k = 0; k < padded_width; k += kBlock)
    sums[k / kBlock] = total(floats(multiply(all_ones(), out + k))) / kSumLanes;
  sums[padded_width / kBlock] = own.scale;
}

// sums[m * WR + i] += rows[i] · x[m] over one group, without the scale of x[m].
template <class G, int WR, int MR>
inline void add_group(const uint8_t* const rows[WR], const FixedRow x[MR], int64_t group, Floats* sums) {
#pragma GCC unroll 4
  for (int i = 0; i < WR; ++i) {
    const uint8_t* header = rows[i] + group * G::kBytes;
    Ints products[MR];
#pragma GCC unroll 4
    for (int b = 0; b < G::kBlocks; ++b) {
      const Block weights = load_block<G>(header + G::kHeader + b * G::kBlockBytes);
#pragma GCC unroll 9
      for (int m = 0; m < MR; ++m) {
        const Ints added = multiply(weights, x[m].values + (group * G::kBlocks + b) * kBlock);
        products[m] = b == 0 ? added : add(products[m], added);
      }
    }
    const float one = 1.0f;
    const Floats scale = G::kHasScale ? all_halves(header) : all_floats(&one);
    const Floats least = G::kHasZero ? all_halves(header + 2) : zero_floats();
#pragma GCC unroll 9
    for (int m = 0; m < MR; ++m) {
      sums[m * WR + i] = fma(floats(products[m]), scale, sums[m * WR + i]);
      if constexpr (G::kHasZero)
#pragma GCC unroll 4
        for (int b = 0; b < G::kBlocks; ++b)
          sums[m * WR + i] = fma(least, all_floats(x[m].sums + group * G::kBlocks + b), sums[m * WR + i]);
    }
  }
}

// out[m * kTile + i] = rows[i] · x[m] for four weight rows, WR of them side by side, and MR activation rows, without
// the scales of the activations.
template <class G, int WR, int MR>
inline void fixed_quad(const uint8_t* const rows[kQuad], const float* x, int64_t stride, int64_t width,
                       const uint8_t* lines, float* out) {
  constexpr int64_t kLines = (WR * G::kBytes + 63) / 64;
  const int64_t groups = width / G::kSize;
  FixedRow own[MR];
  for (int m = 0; m < MR; ++m) own[m] = FixedRow(x + m * stride, stride);
  Floats sums[MR][kQuad];
  for (int i = 0; i < kQuad; i += WR) {
    Floats part[MR * WR];
    for (Floats& sum : part) sum = zero_floats();
    for (int64_t group = 0; group < groups; ++group) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(lines + line * 64);
      lines += WR * G::kBytes;
      add_group<G, WR, MR>(rows + i, own, group, part);
    }
    for (int m = 0; m < MR; ++m)
      for (int j = 0; j < WR; ++j) sums[m][i + j] = part[m * WR + j];
  }
  for (int m = 0; m < MR; ++m) total4(sums[m], out + m * kTile);
}

constexpr int64_t kNearBytes = 24576;  // of activations that stay in L1 beside a stream of weights

// As wide_tile, for rows that quantize_row has converted. With few activation rows, four weight rows side by side hide
// each other's latency; otherwise one weight row streams best, unless the activations do not fit L1.
template <class G>
inline void fixed_tile(const Weight& weight, int64_t n, int64_t count, const float* x, int64_t stride, int64_t rows,
                       int64_t width, const void* next, float* tile) {
  const int64_t blocks = (rows + kFixedBlock<G> - 1) / kFixedBlock<G>;
  for_each_rows<kQuad>(weight, n, count, next, [&](const int64_t* quad, int64_t i, const uint8_t* lines) {
    const uint8_t* own[kQuad];
    for (int j = 0; j < kQuad; ++j) own[j] = weight.row(quad[j]);
    for (int64_t block = 0, m = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      with_count<kFixedBlock<G>>(end - m, [&](auto size) {
        constexpr int kRows = decltype(size)::value;
        constexpr int kSide = kRows > 2 ? 1 : kQuad / kRows, kFar = kRows > 2 ? kFarSide : kSide;
        if (kRows * width * 2 > kNearBytes)
          fixed_quad<G, kFar, kRows>(own, x + m * stride, stride, width, lines, tile + m * kTile + i);
        else
          fixed_quad<G, kSide, kRows>(own, x + m * stride, stride, width, lines, tile + m * kTile + i);
      });
      m = end;
    }
  });
  for (int64_t m = 0; m < rows; ++m) {
    const F16 scale = splat(FixedRow(x + m * stride, stride).scale);
    for (int64_t i = 0; i < count; i += 16) store(tile + m * kTile + i, load(tile + m * kTile + i) * scale);
  }
}
