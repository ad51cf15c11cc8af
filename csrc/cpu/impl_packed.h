// Dot products of packed weight rows with fp32 activations, and the choice of the loop for every format.

// As in impl_dot.h, a row's products are summed in one register over the whole width, whatever the blocking.

// An fp8 (e4m3) number has the bits of an fp16 number with an exponent 8 lower; only NaN differs.
constexpr float kFp8Unit = 256.0f;
inline f16 half_of_fp8(uint8_t bits) {
  const uint32_t rest = bits & 127u;
  return {static_cast<uint16_t>((bits & 128u) << 8 | rest << 7 | (rest == 127 ? 0x7e00u : 0u))};
}

inline float half_at(const uint8_t* p) {
  f16 bits[16] = {};
  __builtin_memcpy(bits, p, 2);
  float out[16];
  store(out, load(bits), 16);
  return out[0];
}

template <class G>
inline float scale_at(const uint8_t* header) {
  if constexpr (!G::kHasScale) return 1.0f;
  if constexpr (!G::kIsFloat) return half_at(header);
  float scale;
  __builtin_memcpy(&scale, header, 4);
  return scale;
}

// Dequantizes `kBlock` values of a group, which starts at `header`.
template <class G>
inline void expand_block(const uint8_t* header, const uint8_t* values, float* out) {
  const F16 scale = splat(scale_at<G>(header));
  const F16 least = splat(G::kHasZero ? half_at(header + 2) : 0.0f);
  if constexpr (G::kIsFloat) {
    f16 halves[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) halves[i] = half_of_fp8(values[i]);
    for (int64_t i = 0; i < kBlock; i += 16) store(out + i, load(halves + i) * splat(kFp8Unit) * scale, 16);
    return;
  }
  int8_t bytes[kBlock];
  if constexpr (G::kBits == 4) {
    constexpr int kLess = G::kHasZero ? 0 : 8;
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      bytes[i] = static_cast<int8_t>((values[i] & 15) - kLess);
      bytes[i + kBlock / 2] = static_cast<int8_t>((values[i] >> 4) - kLess);
    }
  } else {
    __builtin_memcpy(bytes, values, kBlock);
  }
  for (int64_t i = 0; i < kBlock; i += 16) {
    const F16 value = load(bytes + i) * scale;
    store(out + i, G::kHasZero ? value + least : value, 16);
  }
}

// Dequantizes `kBlock` values of row n from column k on.
template <class G>
inline void expand_at(const Weight& weight, int64_t n, int64_t k, int64_t width, float* out) {
  const int64_t group = k / G::kSize;
  if (!weight.panels) {
    const uint8_t* header = weight.row(n) + group * G::kBytes;
    return expand_block<G>(header, header + G::kHeader + k % G::kSize / kBlock * G::kBlockBytes, out);
  }
  const int64_t lane = n % kPanelRows;
  const uint8_t* panel = weight.row(n - lane);
  const uint8_t* headers = panel + group * G::kHeader * kPanelRows;
  const uint8_t* columns = panel + (width / G::kSize * G::kHeader + k / kBlock * G::kBlockBytes) * kPanelRows;
  uint8_t header[4] = {}, values[G::kBlockBytes];
  for (int64_t i = 0; i < G::kHeader; i += 2) __builtin_memcpy(header + i, headers + i * kPanelRows + lane * 2, 2);
  for (int64_t i = 0; i < G::kBlockBytes; i += 4) __builtin_memcpy(values + i, columns + i * kPanelRows + lane * 4, 4);
  if constexpr (G::kBits == 8)
    for (uint8_t& value : values) value ^= 128;
  expand_block<G>(header, values, out);
}

// One row in T.
template <class T>
void expand_row(const Weight& weight, int64_t row, int64_t width, T* out) {
  with_group(weight.format, [&](auto group) {
    float block[kBlock];
    for (int64_t k = 0; k < width; k += kBlock) {
      expand_at<decltype(group)>(weight, row, k, width, block);
      for (int64_t i = 0; i < kBlock; i += 16) store(out + k + i, load(block + i), 16);
    }
  });
}

// out[m * kTile + i] = rows[i] · x[m] for four weight rows and MR activation rows.
template <class G, int MR>
inline void wide_quad(const Weight& weight, const int64_t rows[kQuad], const float* x, int64_t stride, int64_t width,
                      const uint8_t* lines, float* out) {
  F16 sums[MR][kQuad];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < kQuad; ++i) sums[m][i] = splat(0);
  for (int64_t k = 0; k < width; k += kBlock) {
    float w[kQuad][kBlock];
    for (int i = 0; i < kQuad; ++i) {
      expand_at<G>(weight, rows[i], k, width, w[i]);
      __builtin_prefetch(lines + (k / kBlock * kQuad + i) * G::kBlockBytes);
    }
    for (int64_t half = 0; half < kBlock; half += 16)
      for (int m = 0; m < MR; ++m) {
        const F16 lanes = load(x + m * stride + k + half);
        for (int i = 0; i < kQuad; ++i) sums[m][i] = fma(load(w[i] + half), lanes, sums[m][i]);
      }
  }
  for (int m = 0; m < MR; ++m) sum4(sums[m][0], sums[m][1], sums[m][2], sums[m][3], out + m * kTile);
}

// Calls body(indices of kSize weight rows, offset of the first, prefetch address) for the rows [n, n + count) of a
// tile; past the end the last row is repeated. `next` is read after the tile.
template <int kSize, class F>
inline void for_each_rows(const Weight& weight, int64_t n, int64_t count, const void* next, F body) {
  const int64_t step = kSize * weight.pitch, ahead = step == 0 ? 0 : (kAhead + step - 1) / step * step;
  const int64_t bytes = (count + kSize - 1) / kSize * step;
  for (int64_t i = 0; i < count; i += kSize) {
    int64_t rows[kSize];
    for (int64_t j = 0; j < kSize; ++j) rows[j] = n + (i + j < count ? i + j : count - 1);
    const int64_t at = i / kSize * step + ahead;
    body(rows, i, at < bytes ? weight.row(n) + at : static_cast<const uint8_t*>(next) + at - bytes);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<min(count, kMax)>).
template <int kMax, class F>
inline void with_count(int64_t count, F f) {
  if constexpr (kMax > 1) {
    if (count < kMax) return with_count<kMax - 1>(count, f);
  }
  f(Count<kMax>{});
}

// tile[m * kTile + i] = weight[n + i] · x[m] for up to kTile weight rows.
template <class G>
inline void wide_tile(const Weight& weight, int64_t n, int64_t count, const float* x, int64_t stride, int64_t rows,
                      int64_t width, const void* next, float* tile) {
  const int64_t blocks = (rows + LSK_MAX_BLOCK - 1) / LSK_MAX_BLOCK;
  for_each_rows<kQuad>(weight, n, count, next, [&](const int64_t* quad, int64_t i, const uint8_t* lines) {
    for (int64_t block = 0, m = 0; block < blocks; ++block) {
      const int64_t end = rows * (block + 1) / blocks;
      with_count<LSK_MAX_BLOCK>(end - m, [&](auto size) {
        wide_quad<G, decltype(size)::value>(weight, quad, x + m * stride, stride, width, lines, tile + m * kTile + i);
      });
      m = end;
    }
  });
}

#ifdef LSK_INT16
// The scale that maps a row of fp32 to integers up to `max_integer`, and its inverse. NaN and infinity make it NaN.
struct IntegerScale {
  float scale, inverse;

  IntegerScale(const float* row, int64_t padded_width, float max_integer) {
    constexpr float kLeast = 1e-34f;  // the inverse of a smaller scale would overflow; such a row becomes zero
    F16 largest = splat(0), broken = splat(0);
    for (int64_t i = 0; i < padded_width; i += 16) {
      const F16 x = load(row + i);
      largest = max(max(x, splat(0) - x), largest);
      broken = fma(x, splat(0), broken);
    }
    const float found = lane_max(largest);
    inverse = found > kLeast ? max_integer / found : 0.0f;
    scale = (found > kLeast ? found / max_integer : 0.0f) + total(broken);
  }
};

// A row of activations as integers, in the memory of `padded(width)` floats: blocks, the sum of each block, the scale.
template <class V, class S>
struct IntegerRow {
  const V* values;
  const S* sums;
  float scale;

  IntegerRow() = default;
  IntegerRow(const float* row, int64_t padded_width)
      : values(reinterpret_cast<const V*>(row)),
        sums(reinterpret_cast<const S*>(row + padded_width / 2)),
        scale(row[padded_width / 2 + padded_width / kBlock]) {}
};

#include "cpu/impl_fixed.h"
#endif
#ifdef LSK_PANELS
#include LSK_PANELS
#endif

// Whether activations in T are quantized to 16-bit integers, for rows and for panels. fp32 and fp16 would lose
// precision.
template <class T>
constexpr bool kUsesInt16 = false;
template <class T>
constexpr bool kUsesPanels = false;
#ifdef LSK_INT16
template <>
constexpr bool kUsesInt16<bf16> = true;
#endif
#ifdef LSK_PANELS
template <>
constexpr bool kUsesPanels<bf16> = true;
#endif

// The same for one weight. Only rows of a draft head may have any width.
template <class T>
inline bool uses_int16(const Weight& weight, int64_t width) {
  return kUsesInt16<T> && !weight.panels && is_integer(weight.format) && width > 0 && width % kBlock == 0;
}
template <class T>
inline bool uses_panels(const Weight& weight) {
  return kUsesPanels<T> && weight.panels;
}

// Converts rows [begin, end) of activations [rows, width] for such weights; with a norm weight, after rms_norm (rounded
// to T).
template <class T>
void tile(const T* x, const T* norm, float eps, int64_t begin, int64_t end, [[maybe_unused]] int64_t rows,
          int64_t width, const Weight& weight, void* tiled) {
#ifdef LSK_TILES
  if constexpr (__is_same(T, bf16))
    if (weight.format == Format::kPlain)
      return pair_rows(x, norm, eps, begin, end, rows, width, static_cast<T*>(tiled));
#endif
  const int64_t stride = padded(width);
  for (int64_t r = begin; r < end; ++r) {
    if (weight.format == Format::kPlain) {
      using X = typename Dot<T>::X;
      tile_row(x + r * width, norm, eps, width, static_cast<X*>(tiled) + r * stride);
      continue;
    }
    float* row = static_cast<float*>(tiled) + r * stride;
    tile_row(x + r * width, norm, eps, width, row);
#ifdef LSK_INT16
    if (uses_int16<T>(weight, width)) quantize_row(row, stride);
#endif
#ifdef LSK_PANELS
    if (uses_panels<T>(weight)) quantize_row_halves(row, stride);
#endif
  }
}

// tile[m * kTile + i] = weight[n + i] · x[first + m] for up to kTile weight rows and up to kMaxRows tiled activation
// rows. `next` is read after this tile.
template <class T>
inline void multiply_tile(const Weight& weight, int64_t n, int64_t count, const TiledActivations& x, int64_t first,
                          int64_t rows, const void* next, float* tile) {
#ifdef LSK_TILES
  if constexpr (__is_same(T, bf16))
    if (weight.format == Format::kPlain) return multiply_tiles(weight, n, count, x, first, rows, next, tile);
#endif
  const int64_t stride = padded(x.width);
  if (weight.format == Format::kPlain) {
    const auto* own = static_cast<const typename Dot<T>::X*>(x.data) + first * stride;
    const T* plain = reinterpret_cast<const T*>(weight.row(n));
    return dot_tile(plain, x.width, count, own, stride, rows, x.width, next, tile);
  }
  const float* own = static_cast<const float*>(x.data) + first * stride;
#ifdef LSK_PANELS
  if (uses_panels<T>(weight))
    return with_group(weight.format, [&](auto group) {
      using G = decltype(group);
      if constexpr (kUsesPanels<T> && !G::kIsFloat)
        panel_tile<G>(weight, n, count, own, stride, rows, x.width, next, tile);
    });
#endif
#ifdef LSK_INT16
  if (uses_int16<T>(weight, x.width))
    return with_group(weight.format, [&](auto group) {
      using G = decltype(group);
      if constexpr (kUsesInt16<T> && !G::kIsFloat)
        fixed_tile<G>(weight, n, count, own, stride, rows, x.width, next, tile);
    });
#endif
  if (weight.format == Format::kRows) {
    const int8_t* plain = reinterpret_cast<const int8_t*>(weight.row(n));
    return dot_tile(plain, x.width, count, own, stride, rows, x.width, next, tile);
  }
  with_group(weight.format, [&](auto group) {
    using G = decltype(group);
    wide_tile<G>(weight, n, count, own, stride, rows, x.width, next, tile);
  });
}
