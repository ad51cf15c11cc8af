// Tile registers of the processor (AMX). The first operand of each macro is a literal.

#define TILE_LOAD(tile, from, pitch) _tile_loadd(tile, from, pitch)
#define TILE_STORE(tile, to, pitch) _tile_stored(tile, to, pitch)
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_DOT_BF16(sums, a, b) _tile_dpbf16ps(sums, a, b)

inline void load_tile_config(const TileConfig& config) { _tile_loadconfig(&config); }
inline void release_tiles() { _tile_release(); }
inline void expect_released_tiles() {}
