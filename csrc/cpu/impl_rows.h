// Norms, tiling of activations, RoPE, and the matmuls with their epilogues.

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(x): 2^n times a polynomial on [-ln2/2, ln2/2] (minimax coefficients of Cephes' expf). NaN stays NaN.
inline F16 exp(F16 x) {
  x = max(splat(-87.0f), x);
  const F16 n = round(x * splat(1.44269504f));
  F16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1));
  return scale_by_power_of_two(p, n);
}

// 2^x, with a relative error of 7.5e-5: 1/50 of the rounding error of bf16. NaN stays NaN.
inline F16 coarse_exp2(F16 x) {
  x = max(splat(-126.0f), x);
  const F16 n = round(x);
  const F16 r = x - n;
  F16 p = fma(splat(0.05517167f), r, splat(0.24261112f));
  p = fma(p, r, splat(0.69326099f));
  p = fma(p, r, splat(0.99992807f));
  return scale_by_power_of_two(p, n);
}

inline float total(F16 a) {
  float out[4];
  const F16 zero = splat(0);
  sum4(a, zero, zero, zero, out);
  return out[0];
}

template <class T>
inline float inverse_rms(const T* x, float eps, int64_t width) {
  F16 squares = splat(0);
  for (int64_t i = 0; i < width; i += 16) {
    const F16 lanes = load(x + i, smaller(16, width - i));
    squares = fma(lanes, lanes, squares);
  }
  return 1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(width) + eps);
}

template <class T>
void rms_norm(const T* x, const T* weight, float eps, int64_t width, T* out) {
  const F16 inverse = splat(inverse_rms(x, eps, width));
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t n = smaller(16, width - i);
    store(out + i, load(x + i, n) * inverse * load(weight + i, n), n);
  }
}

// Converts one row to X, zero-padded; with a norm, it is rounded to T in between.
template <class T, class X>
void tile_row(const T* x, const T* norm, float eps, int64_t width, X* out) {
  if constexpr (__is_same(T, X)) {
    if (!norm) {
      __builtin_memcpy(out, x, width * sizeof(T));
      __builtin_memset(out + width, 0, (padded(width) - width) * sizeof(T));
      return;
    }
  }
  const F16 inverse = splat(norm ? inverse_rms(x, eps, width) : 1.0f);
  const int64_t end = padded(width);
  for (int64_t i = 0; i < end; i += 16) {
    const int64_t n = i < width ? smaller(16, width - i) : 0;
    F16 lanes = load(x + i, n);
    if (norm) {
      T rounded[16];
      store(rounded, lanes * inverse * load(norm + i, n), 16);
      lanes = load(rounded);
    }
    store(out + i, lanes, 16);
  }
}

#ifdef LSK_TILES
#include "cpu/impl_tiles.h"
#endif
#include "cpu/impl_packed.h"

// Calls body(first weight row, number of weight rows, first activation row, number of activation rows).
template <class F>
inline void for_each_tile(const TiledActivations& x, int64_t begin, int64_t end, F body) {
  for (int64_t n = begin; n < end; n += kTile)
    for (int64_t m = 0; m < x.rows; m += kMaxRows) body(n, smaller(kTile, end - n), m, smaller(kMaxRows, x.rows - m));
}

template <class T>
void linear(const LinearArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) float tile[kMaxRows * kTile];
  for_each_tile(a.x, begin, end, [&](int64_t n, int64_t count, int64_t m, int64_t rows) {
    const void* next = n + count < end ? a.weight.row(n + count) : a.next;
    multiply_tile<T>(a.weight, n, count, a.x, m, rows, next, tile);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (m + r) * a.d_out + n;
      for (int64_t i = 0; i < count; i += 16) {
        const int64_t lanes = smaller(16, count - i);
        F16 sum = load(tile + r * kTile + i);
        if (a.bias) sum = sum + load(a.bias + n + i, lanes);
        if (a.residual) sum = sum + load(a.residual + at + i, lanes);
        store(a.out + at + i, sum, lanes);
      }
    }
  });
}

template <class T>
void swiglu(const SwigluArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) float gate[kMaxRows * kTile], up[kMaxRows * kTile];
  for_each_tile(a.x, begin, end, [&](int64_t n, int64_t count, int64_t m, int64_t rows) {
    multiply_tile<T>(a.gate, n, count, a.x, m, rows, a.up.row(n), gate);
    multiply_tile<T>(a.up, n, count, a.x, m, rows, n + count < end ? a.gate.row(n + count) : a.next, up);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < count; i += 16) {
        const F16 g = load(gate + r * kTile + i), u = load(up + r * kTile + i);
        // exp overflows above 88; below -87 silu is 0
        const F16 silu = g / (splat(1) + exp(splat(0) - max(splat(-87.0f), g)));
        store(a.out + (m + r) * a.d_out + n + i, silu * u, smaller(16, count - i));
      }
    }
  });
}

// One head at one position: optional norm (rounded to T), then (a, b) -> (a cos - b sin, b cos + a sin) on halves.
template <class T>
void rope(const RopeArgs<T>& args, const T* x, T* out) {
  alignas(64) T normed[256];
  if (args.norm) {
    rms_norm(x, args.norm, args.eps, args.head_dim, normed);
    x = normed;
  }
  const int64_t half = args.head_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = smaller(16, half - i);
    const F16 a = load(x + i, n), b = load(x + half + i, n);
    const F16 cos = load(args.cos + i, n), sin = load(args.sin + i, n);
    store(out + i, a * cos - b * sin, n);
    store(out + half + i, fma(a, sin, b * cos), n);
  }
}
