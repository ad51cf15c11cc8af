// Tile registers in plain C++, for tests on machines without AMX; use that the processor would fault on aborts.

struct TileState {
  TileConfig config;
  bool configured = false;
  alignas(64) uint8_t data[8][16][64];
};
inline thread_local TileState tile_state;

inline void require_tile(bool condition) {
  if (!condition) __builtin_trap();
}

inline void load_tile_config(const TileConfig& config) {
  require_tile(config.palette == 1 && config.start_row == 0);
  for (int i = 0; i < 8; ++i) require_tile(config.rows[i] <= 16 && config.row_bytes[i] <= 64);
  tile_state.config = config;
  tile_state.configured = true;
  __builtin_memset(tile_state.data, 0, sizeof(tile_state.data));
}
inline void release_tiles() { tile_state.configured = false; }
// The processor does not check this; torch's own kernels would compute with a configuration that is left.
inline void expect_released_tiles() { require_tile(!tile_state.configured); }

// Rows and bytes of a row of a register in use.
inline int tile_rows(int tile) {
  require_tile(tile_state.configured && tile_state.config.rows[tile] > 0);
  return tile_state.config.rows[tile];
}
inline int tile_row_bytes(int tile) { return tile_state.config.row_bytes[tile]; }

inline void zero_tile(int tile) {
  tile_rows(tile);
  __builtin_memset(tile_state.data[tile], 0, sizeof(tile_state.data[tile]));
}
inline void load_tile(int tile, const void* from, int64_t pitch) {
  const int rows = tile_rows(tile);
  zero_tile(tile);
  for (int i = 0; i < rows; ++i)
    __builtin_memcpy(tile_state.data[tile][i], static_cast<const uint8_t*>(from) + i * pitch, tile_row_bytes(tile));
}
inline void store_tile(int tile, void* to, int64_t pitch) {
  const int rows = tile_rows(tile);
  for (int i = 0; i < rows; ++i)
    __builtin_memcpy(static_cast<uint8_t*>(to) + i * pitch, tile_state.data[tile][i], tile_row_bytes(tile));
}

inline float without_denormals(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
inline float tile_number(const uint8_t* from) {
  uint16_t half;
  __builtin_memcpy(&half, from, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return without_denormals(out);
}

// sums += a · b, as TDPBF16PS rounds: the even products and the odd ones are summed apart, in order, then added.
inline void dot_tiles_bf16(int sums, int a, int b) {
  const int rows = tile_rows(sums), pairs = tile_rows(b);
  require_tile(rows == tile_rows(a) && tile_row_bytes(sums) == tile_row_bytes(b) && tile_row_bytes(a) == 4 * pairs);
  require_tile(sums != a && sums != b && a != b);
  const auto& from_a = tile_state.data[a];
  const auto& from_b = tile_state.data[b];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < tile_row_bytes(sums); n += 4) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < pairs; ++k) {
        even = without_denormals(even + tile_number(from_a[m] + 4 * k) * tile_number(from_b[k] + n));
        odd = without_denormals(odd + tile_number(from_a[m] + 4 * k + 2) * tile_number(from_b[k] + n + 2));
      }
      __builtin_memcpy(&sum, tile_state.data[sums][m] + n, 4);
      sum = without_denormals(without_denormals(sum) + without_denormals(even + odd));
      __builtin_memcpy(tile_state.data[sums][m] + n, &sum, 4);
    }
  }
}

#define TILE_LOAD(tile, from, pitch) load_tile(tile, from, pitch)
#define TILE_STORE(tile, to, pitch) store_tile(tile, to, pitch)
#define TILE_ZERO(tile) zero_tile(tile)
#define TILE_DOT_BF16(sums, a, b) dot_tiles_bf16(sums, a, b)
