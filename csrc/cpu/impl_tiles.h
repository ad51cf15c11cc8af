// Products of plain bf16 weight rows with bf16 activations by tile instructions (AMX): up to sixteen rows of each at
// once.

// Weights are read as they lie in memory: a tile is 32 columns of sixteen rows. Activations are the other operand: a
// tile is sixteen pairs of columns, each of up to sixteen rows. A result sums its products tile by tile in the order of
// the columns, whatever the blocking, so results do not depend on the number of rows.

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 32;

// The operand of the instruction that sets the shapes of the tile registers.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#include LSK_TILES

// Tile registers for two groups of weight rows and two groups of activation rows: the sums of weight group g and
// activation group b are number 2 g + b, the weights 4 + g, the activations 6 + b. Released at the end, since other
// libraries use the registers in the same thread.
class TileRegisters {
 public:
  TileRegisters() { expect_released_tiles(); }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (sizes_) release_tiles();
  }

  // Sets the number of rows of each group; at least one, and at most sixteen.
  void resize(int64_t weights0, int64_t weights1, int64_t activations0, int64_t activations1) {
    const uint32_t sizes = static_cast<uint32_t>(weights0 | weights1 << 8 | activations0 << 16 | activations1 << 24);
    if (sizes == sizes_) return;  // loading a configuration takes about as long as three products
    sizes_ = sizes;
    const int64_t weights[2] = {weights0, weights1}, activations[2] = {activations0, activations1};
    TileConfig config;
    for (int g = 0; g < 2; ++g) {
      for (int b = 0; b < 2; ++b) set(config, 2 * g + b, weights[g], activations[b]);
      set(config, 4 + g, weights[g], kTileColumns / 2);
      set(config, 6 + g, kTileColumns / 2, activations[g]);
    }
    load_tile_config(config);
  }

 private:
  static void set(TileConfig& config, int tile, int64_t rows, int64_t words) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(4 * words);
  }

  uint32_t sizes_ = 0;
};

// Up to sixteen activation rows in pairs of columns: [padded width / 2][rows][2].
struct PairedRows {
  const bf16* data;
  int64_t rows;

  // The group that begins at row `first`, a multiple of sixteen, of tiled activations.
  PairedRows(const TiledActivations& x, int64_t first)
      : data(static_cast<const bf16*>(x.data) + first * padded(x.width)), rows(smaller(kTileRows, x.rows - first)) {}
};

// Converts rows [begin, end) of x [rows, width] to groups of pairs; with a norm weight, after rms_norm. The second half
// of `tiled` holds the rows in between.
template <class T>
void pair_rows(const T* x, const T* norm, float eps, int64_t begin, int64_t end, int64_t rows, int64_t width,
               T* tiled) {
  const int64_t stride = padded(width);
  T* const converted = tiled + rows * stride;
  const bool as_is = !norm && width == stride;
  for (int64_t r = begin; r < end;) {
    const int64_t group = r / kTileRows * kTileRows, columns = smaller(kTileRows, rows - group);
    const int64_t count = smaller(end, group + columns) - r;
    const float* from[kTileRows];  // words of two columns; the last row is repeated
    for (int64_t i = 0; i < kTileRows; ++i) {
      T* row = converted + (r + i) * stride;
      if (i < count && !as_is) tile_row(x + (r + i) * width, norm, eps, width, row);
      from[i] = i < count ? reinterpret_cast<const float*>(as_is ? x + (r + i) * width : row) : from[count - 1];
    }
    float* to = reinterpret_cast<float*>(tiled + group * stride) + (r - group);
    if (count == kTileRows) {
      for (int64_t word = 0; word < stride / 2; word += 16) {
        transpose(from, to + word * kTileRows, kTileRows);
        for (const float*& row : from) row += 16;
      }
    } else {
      for (int64_t word = 0; word < stride / 2; ++word)
        for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + word * columns + i, from[i] + word, sizeof(float));
    }
    r += count;
  }
}

// sums[g, b] += weights[g] · activations[b] for tiles in memory, the rows of the weights `pitch` bytes apart.
template <int GROUPS, int BLOCKS>
inline void add_tiles(const uint8_t* weights, int64_t pitch, const PairedRows* x, int64_t k) {
  TILE_LOAD(6, x[0].data + k * x[0].rows, 4 * x[0].rows);
  TILE_LOAD(4, weights, pitch);
  TILE_DOT_BF16(0, 4, 6);
  if constexpr (BLOCKS == 2) {
    TILE_LOAD(7, x[1].data + k * x[1].rows, 4 * x[1].rows);
    TILE_DOT_BF16(1, 4, 7);
  }
  if constexpr (GROUPS == 2) {
    TILE_LOAD(5, weights + kTileRows * pitch, pitch);
    TILE_DOT_BF16(2, 5, 6);
    if constexpr (BLOCKS == 2) TILE_DOT_BF16(3, 5, 7);
  }
}

// out[m * kTile + i] = weights[i] · x[m] for GROUPS groups of weight rows, `count` rows in all, and BLOCKS groups of
// activation rows. Rows and columns of `out` are written in multiples of sixteen.
template <int GROUPS, int BLOCKS>
inline void dot_tiles(TileRegisters& registers, const uint8_t* weights, int64_t pitch, int64_t count,
                      const PairedRows* x, int64_t width, float* out) {
  const int64_t last = count - (GROUPS - 1) * kTileRows;
  registers.resize(GROUPS == 2 ? kTileRows : last, last, x[0].rows, x[BLOCKS - 1].rows);
  asm volatile("" ::: "memory");  // compilers do not know that loading a tile reads memory
  TILE_ZERO(0);
  if constexpr (BLOCKS == 2) TILE_ZERO(1);
  if constexpr (GROUPS == 2) TILE_ZERO(2);
  if constexpr (GROUPS == 2 && BLOCKS == 2) TILE_ZERO(3);
  int64_t k = 0;
  for (; k + kTileColumns <= width; k += kTileColumns)
    add_tiles<GROUPS, BLOCKS>(weights + k * sizeof(bf16), pitch, x, k);
  if (k < width) {  // nothing past a row is read: it may be NaN, or not there
    alignas(64) bf16 rest[GROUPS * kTileRows][kTileColumns] = {};
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(rest[i], weights + i * pitch + k * sizeof(bf16), (width - k) * sizeof(bf16));
    asm volatile("" ::: "memory");
    add_tiles<GROUPS, BLOCKS>(reinterpret_cast<const uint8_t*>(rest), sizeof(rest[0]), x, k);
  }
  alignas(64) float sums[GROUPS * BLOCKS][kTileRows][kTileRows] = {};
  TILE_STORE(0, sums[0], 64);
  if constexpr (BLOCKS == 2) TILE_STORE(1, sums[1], 64);
  if constexpr (GROUPS == 2) TILE_STORE(2, sums[BLOCKS], 64);
  if constexpr (GROUPS == 2 && BLOCKS == 2) TILE_STORE(3, sums[3], 64);
  for (int g = 0; g < GROUPS; ++g) {
    for (int b = 0; b < BLOCKS; ++b) {
      const float* rows[kTileRows];
      for (int i = 0; i < kTileRows; ++i) rows[i] = sums[g * BLOCKS + b][i];
      transpose(rows, out + b * kTileRows * kTile + g * kTileRows, kTile);
    }
  }
}

// As multiply_tile, for plain weights and rows that pair_rows has converted. Few activation rows read weights from
// memory, sixteen rows at a time; many reuse two groups of each.
inline void multiply_tiles(const Weight& weight, int64_t n, int64_t count, const TiledActivations& x, int64_t first,
                           int64_t rows, const void* next, float* tile) {
  constexpr int64_t kFew = 2 * kTileRows, kFetched = 128;  // activation rows; bytes of each weight row
  TileRegisters registers;
  for (int64_t m = 0; m < rows; m += 2 * kTileRows) {
    const bool alone = rows - m <= kTileRows;
    const PairedRows own[2] = {{x, first + m}, {x, first + (alone ? m : m + kTileRows)}};
    float* out = tile + m * kTile;
    for (int64_t i = 0; i < count;) {
      const uint8_t* weights = weight.row(n + i);
      if (rows > kFew && count - i > kTileRows) {
        const int64_t both = smaller(2 * kTileRows, count - i);
        if (alone)
          dot_tiles<2, 1>(registers, weights, weight.pitch, both, own, x.width, out + i);
        else
          dot_tiles<2, 2>(registers, weights, weight.pitch, both, own, x.width, out + i);
        i += both;
        continue;
      }
      const int64_t one = smaller(kTileRows, count - i);
      // The processor's own prefetcher continues a row whose beginning was read.
      const uint8_t* ahead = i + one < count ? weight.row(n + i + one) : static_cast<const uint8_t*>(next);
      for (int64_t r = 0; m == 0 && r < kTileRows; ++r)
        for (int64_t line = 0; line < kFetched; line += 64) __builtin_prefetch(ahead + r * weight.pitch + line);
      if (alone)
        dot_tiles<1, 1>(registers, weights, weight.pitch, one, own, x.width, out + i);
      else
        dot_tiles<1, 2>(registers, weights, weight.pitch, one, own, x.width, out + i);
      i += one;
    }
  }
}

#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_ZERO
#undef TILE_DOT_BF16
