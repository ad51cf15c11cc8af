// float2, uint4 and their like, with CUDA's alignment.
#pragma once

#define EMU_VECTORS(type, name)                                                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                \
  struct name##3 { type x, y, z; };                                                       \
  struct alignas(sizeof(type) >= 4 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                        \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }             \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

EMU_VECTORS(float, float)
EMU_VECTORS(double, double)
EMU_VECTORS(int, int)
EMU_VECTORS(short, short)
EMU_VECTORS(unsigned short, ushort)
EMU_VECTORS(signed char, char)
EMU_VECTORS(unsigned char, uchar)
EMU_VECTORS(long long, longlong)
EMU_VECTORS(unsigned long long, ulonglong)
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
