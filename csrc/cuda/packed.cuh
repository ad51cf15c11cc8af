// Packed weights (layout in layerskip_kernels/formats.py): copied as bytes to a ring in shared memory, and unpacked
// into registers. Only packed bytes are in flight, and nothing is written back.
//
// A row is a stream of bytes. Groups have 18 to 132 bytes, so rows and groups begin at any even byte. A stream is
// copied as the aligned 16-byte chunks that contain it, the first of which may begin before it; only the matrix must be
// aligned to 16 bytes. Reads from the ring combine aligned words by funnel shifts.
#pragma once

#include "common/weight.h"
#include "cuda/common.cuh"

namespace lsk {

// Layout of a block of 32 columns. Lane t of a quad takes columns 8 t to 8 t + 7.
struct Int8 {
  static constexpr int kBlockBytes = 32;
};
struct Int4 {  // column k < 16 and column k + 16 share a byte
  static constexpr int kBlockBytes = 16;
};
struct Fp8 {
  static constexpr int kBlockBytes = 32;
};

constexpr int kPackedColumns = static_cast<int>(kPackedBlock);

// The group size is a run-time value: one kernel serves both.
struct PackedMatrix {
  const uint8_t *data, *end;
  int pitch;         // bytes of a row
  int group_blocks;  // blocks per group
  int header;        // bytes before a group's values
  bool has_zero;

  PackedMatrix() = default;
  PackedMatrix(const Weight& weight, int64_t rows)
      : data(weight.data), end(weight.row(rows)), pitch(static_cast<int>(weight.pitch)) {
    with_group(weight.format,
               [&](auto group) { group_blocks = group.kBlocks, header = group.kHeader, has_zero = group.kHasZero; });
  }

  __device__ __forceinline__ const uint8_t* row(int64_t n) const { return data + n * pitch; }
  __device__ __forceinline__ int group_bytes(int block_bytes) const { return header + group_blocks * block_bytes; }
  // Subtracted from four-bit values.
  __device__ __forceinline__ int less() const { return has_zero ? 0 : 8; }
};

// Scale and minimum of a group.
struct Factors {
  float scale, least;
};

__device__ __forceinline__ float half_bits(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// From the first four bytes of a group.
template <class W>
__device__ __forceinline__ Factors factors_of(uint32_t header, bool has_zero) {
  if constexpr (std::is_same_v<W, Fp8>) return {__uint_as_float(header), 0.0f};
  return {half_bits(header & 0xffff), has_zero ? half_bits(header >> 16) : 0.0f};
}

// Ring of the streams of a warp: lane 4 g + t has rows g, g + 8, ... A stage has 64 bytes of each.
template <int kRows, int kBytes>
struct PackedRing {
  static constexpr int kStage = 64, kStages = kBytes / kStage;
  static constexpr int kPitch = kBytes + 16;  // avoids bank conflicts
  static_assert((kBytes & (kBytes - 1)) == 0);
  using Memory = unsigned char[8 * kRows][kPitch];

  Memory& memory;
  const uint8_t* from[kRows];  // this lane's chunk of a stream's first stage
  int left[kRows];             // bytes from there to the stream's end

  __device__ __forceinline__ explicit PackedRing(Memory& shared) : memory(shared) {}

  // Offset of a stream in its first chunk.
  static __device__ __forceinline__ int skew(const uint8_t* first) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(first) & 15);
  }
  // Number of stages for `bytes` of a stream with any offset.
  static __host__ __device__ constexpr int stages_of(int bytes) { return (bytes + 14 + kStage - 1) / kStage; }

  // Sets stream r to `bytes` from `first` on. Its last chunk is copied as a whole, but not past the `end` of the
  // matrix.
  __device__ __forceinline__ void aim(int r, const uint8_t* first, int bytes, const uint8_t* end) {
    const int place = static_cast<int>(threadIdx.x % 4) * 16, ahead = skew(first);
    from[r] = first - ahead + place;
    const int64_t whole = bytes == 0 ? 0 : (ahead + bytes + 15) / 16 * 16, within = end - first + ahead;
    left[r] = static_cast<int>(min(whole, within)) - place;
  }

  // Copies stage `stage` of the streams to slot `slot` of the ring.
  __device__ __forceinline__ void fetch(int stage, int slot) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, done = stage * kStage;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      unsigned char* to = &memory[8 * r + g][(slot * kStage & (kBytes - 1)) + 16 * t];
      if (left[r] > done) ptx::cp_async<16>(to, from[r] + done, min(left[r] - done, 16));
    }
    ptx::cp_async_commit();
  }

  // The word of stream r that holds byte `at`, counted from the ring's first stage on.
  __device__ __forceinline__ uint32_t word(int r, int at) const {
    const int g = threadIdx.x % 32 / 4;
    return *reinterpret_cast<const uint32_t*>(&memory[8 * r + g][at & (kBytes - 1) & ~3]);
  }

  // Four and eight bytes at an even offset. Reads no word outside of them, which may still be in flight.
  __device__ __forceinline__ uint32_t four(int r, int at) const {
    return __funnelshift_r(word(r, at), word(r, at + 3), (at & 2) * 8);
  }
  __device__ __forceinline__ void eight(int r, int at, uint32_t (&out)[2]) const {
    const uint32_t middle = word(r, at + 4);
    out[0] = __funnelshift_r(word(r, at), middle, (at & 2) * 8);
    out[1] = __funnelshift_r(middle, word(r, at + 7), (at & 2) * 8);
  }
};

// Byte offset of lane t's columns in a block, and its values in a word.
template <class W>
__device__ __forceinline__ int lane_place(int t) {
  return std::is_same_v<W, Int4> ? t % 2 * 8 : t * 8;
}

template <class W>
__device__ __forceinline__ uint32_t lane_values(uint32_t word, int t) {
  return std::is_same_v<W, Int4> ? word >> t / 2 * 4 & 0x0f0f0f0f : word;
}

// Converts four values to pairs of T, exactly. Integers become the low bits of 128 (bf16) or 1024 (fp16), which is then
// subtracted; an int8 is its lower seven bits minus the eighth, since bf16 has seven mantissa bits. e4m3 has the bits
// of a number of T with another exponent; its NaN (all ones) is converted separately.
template <class T, class W>
__device__ __forceinline__ void widen(uint32_t word, int less, uint32_t (&out)[2]) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr uint32_t kOne = kBf16 ? 0x3f803f80 : 0x3c003c00, kOver = kBf16 ? 0x43434343 : 0x64646464;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t select = i == 0 ? 0x4140 : 0x4342;  // bytes 2 i and 2 i + 1, each as the low byte of a pair
    if constexpr (std::is_same_v<W, Int4>) {
      const uint32_t away = (kBf16 ? 0xc300c300 : 0xe400e400) | less * 0x00010001u;
      out[i] = ptx::fma_pair<T>(__byte_perm(word, kOver, select), kOne, away);
    } else if constexpr (std::is_same_v<W, Int8> && kBf16) {
      const uint32_t low = __byte_perm(word & 0x7f7f7f7f, kOver, select);
      out[i] = ptx::fma_pair<T>(low, kOne, __byte_perm(word & 0x80808080, 0xc3c3c3c3, select));
    } else if constexpr (std::is_same_v<W, Int8>) {
      out[i] = ptx::fma_pair<T>(__byte_perm(word ^ 0x80808080, kOver, select), kOne, 0xe480e480);
    } else {
      const uint32_t bits = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424), size = bits & 0x7f007f00;
      const uint32_t moved = (bits & 0x80008000) | size >> (kBf16 ? 4 : 1);
      const uint32_t broken = ((size + 0x01000100) & 0x80008000) >> 8;
      out[i] = ptx::fma_pair<T>(moved, kBf16 ? 0x7b807b80 : 0x5c005c00, 0) | broken * 0xff;
    }
  }
}

// Value i of a word, in fp32.
template <class W>
__device__ __forceinline__ float value_at(uint32_t word, int i, int less) {
  const uint32_t bits = word >> 8 * i & 0xff;
  if constexpr (std::is_same_v<W, Int4>) return static_cast<float>(static_cast<int>(bits) - less);
  if constexpr (std::is_same_v<W, Int8>) return static_cast<float>(static_cast<int8_t>(bits));
  const float size = __uint_as_float((bits & 0x7f) << 20 | (bits & 0x80) << 24) * 0x1p120f;
  return (bits & 0x7f) == 0x7f ? nanf("") : size;
}

template <class W>
__device__ __forceinline__ float weight_at(uint32_t word, int i, int less, const Factors& of) {
  return __fmaf_rn(value_at<W>(word, i, less), of.scale, of.least);
}

// One weight of a row in global memory, for embedding lookups.
template <class W>
__device__ __forceinline__ float weight_in(const PackedMatrix& matrix, const uint8_t* row, int column) {
  const int block = column / kPackedColumns, place = column % kPackedColumns;
  const uint8_t* group = row + block / matrix.group_blocks * matrix.group_bytes(W::kBlockBytes);
  const uint8_t* values = group + matrix.header + block % matrix.group_blocks * W::kBlockBytes;
  const auto* halves = reinterpret_cast<const uint16_t*>(group);
  const Factors of = factors_of<W>(halves[0] | uint32_t{halves[1]} << 16, matrix.has_zero);
  uint32_t bits = values[place % W::kBlockBytes];
  if constexpr (std::is_same_v<W, Int4>) bits = bits >> place / 16 * 4 & 15;
  return weight_at<W>(bits, 0, matrix.less(), of);
}

}  // namespace lsk
