// csrc/cuda/ptx.cuh in plain C++.
#pragma once

namespace lsk::ptx {

template <class T = unsigned char>
T* dynamic_shared() {
  return static_cast<T*>(emu::dynamic_shared());
}

inline void prefetch_l2(const void*) {}

template <int N>
void cp_async(void* shared, const void* global, int valid = N) {
  static_assert(N == 4 || N == 8 || N == 16);
  emu::cp_async(shared, global, N, valid);
}

inline void cp_async_commit() { emu::cp_async_commit(); }

template <int N>
void cp_async_wait() {
  emu::cp_async_wait(N);
}

struct MatrixRows {
  uint32_t* registers;
  const uint16_t* row;
};

// Lane l gets elements 2 (l % 4) and the next of row l / 4 of each matrix; transposed, of its column l / 4.
template <int Count, bool Transposed>
EMU_PLAIN void complete_ldmatrix(void* const* requests, unsigned mask) {
  if (mask != 0xffffffffu) emu::fail("ldmatrix by lanes 0x%08x, expected all", mask);
  for (int l = 0; l < 32; ++l) {
    for (int matrix = 0; matrix < Count; ++matrix) {
      const auto element = [&](int row, int column) {
        return uint32_t{static_cast<const MatrixRows*>(requests[8 * matrix + row])->row[column]};
      };
      const int major = l / 4, minor = l % 4 * 2;
      static_cast<MatrixRows*>(requests[l])->registers[matrix] =
          Transposed ? element(minor, major) | element(minor + 1, major) << 16
                     : element(major, minor) | element(major, minor + 1) << 16;
    }
  }
}

template <bool Transposed, int Count>
EMU_PLAIN void load_matrices(uint32_t (&r)[Count], const void* row, unsigned line) {
  if (emu::lane() < 8 * Count) {  // the other lanes' addresses are not used
    if (!emu::is_shared(row)) emu::fail("ldmatrix from %p, which is not shared memory", row);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fail("ldmatrix from %p, misaligned", row);
    emu::access(row, 16, emu::Access::read, __builtin_return_address(0));
  }
  MatrixRows request{r, static_cast<const uint16_t*>(row)};
  emu::collective(0xffffffffu, "ldmatrix", complete_ldmatrix<Count, Transposed>, &request, line);
}

template <int Count>
void ldmatrix(uint32_t (&r)[Count], const void* row, unsigned line = __builtin_LINE()) {
  load_matrices<false>(r, row, line);
}

template <int Count>
void ldmatrix_trans(uint32_t (&r)[Count], const void* row, unsigned line = __builtin_LINE()) {
  load_matrices<true>(r, row, line);
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// Element k of register pair (row or column `group`, `register`): 16 bits each, the lower first.
template <class T>
EMU_PLAIN float half_of(uint32_t pair, int k) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * k);
  return std::is_same_v<T, __half> ? emu::f16_value(bits) : emu::bf16_value(bits);
}

// Rows of a and columns of b as the fragments spread them: lane 4 g + q holds rows g and g + 8 of a, column g of b, and
// of those the k in {2 q, 2 q + 1} + {0, 8}.
template <class T>
EMU_PLAIN void complete_mma(void* const* requests, unsigned mask) {
  if (mask != 0xffffffffu) emu::fail("mma by lanes 0x%08x, expected all", mask);
  float a[16][16], b[8][16];
  for (int l = 0; l < 32; ++l) {
    const auto& fragment = *static_cast<const Fragments*>(requests[l]);
    const int g = l / 4, q = l % 4;
    for (int r = 0; r < 4; ++r)
      for (int k = 0; k < 2; ++k) a[g + r % 2 * 8][2 * q + k + r / 2 * 8] = half_of<T>(fragment.a[r], k);
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 2; ++k) b[g][2 * q + k + r * 8] = half_of<T>(fragment.b[r], k);
  }
  for (int l = 0; l < 32; ++l) {
    for (int r = 0; r < 4; ++r) {
      const float *row = a[l / 4 + r / 2 * 8], *column = b[l % 4 * 2 + r % 2];
      float& d = static_cast<const Fragments*>(requests[l])->d[r];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      d += sum;
    }
  }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], unsigned line = __builtin_LINE()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  Fragments request{d, a, b};
  emu::collective(0xffffffffu, "mma", complete_mma<T>, &request, line);
}

template <class T>
EMU_PLAIN uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int k = 0; k < 2; ++k) {
    const float x = std::fma(half_of<T>(a, k), half_of<T>(b, k), half_of<T>(c, k));
    d |= uint32_t{std::is_same_v<T, __half> ? emu::f16_bits(x) : emu::bf16_bits(x)} << 16 * k;
  }
  return d;
}

inline void dependents_trigger() { emu::dependents_trigger(); }
inline void dependency_wait() { emu::dependency_wait(); }
inline void barrier_sync(int id, int threads) { emu::block_barrier(id, threads); }
inline unsigned ticket(unsigned* counter) {
  const unsigned before = emu::update(counter, [](unsigned old) { return old + 1; });
  emu::ticket(counter);
  return before;
}
inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace lsk::ptx
