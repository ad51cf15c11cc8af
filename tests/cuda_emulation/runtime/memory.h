// Device buffers: each ends at a page that cannot be touched, and is known by its place in the argument list.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda_emulation/runtime/history.h"

namespace emu {

constexpr size_t kAreaBytes = size_t{1} << 36, kGuardBytes = size_t{1} << 20, kSectorBytes = 32;
constexpr size_t kVast = size_t{1} << 30;  // bytes of a buffer that is never touched as a whole
constexpr unsigned char kPoison = 0xFF;    // NaN in every floating type, -1 in every integer

// What one kernel moved, by buffer. `by_block` counts each 32-byte sector once a block that touches it, `distinct` once
// a launch: what must come out of L2, and out of memory.
struct Traffic {
  uint64_t requested = 0, by_block = 0, distinct = 0, written = 0;
};

struct Buffer {
  std::string name;
  char* begin;
  size_t bytes;
  char* mapping;
  size_t mapped;
  bool writable = true;
  std::vector<uint32_t> block_stamp, launch_stamp;  // one a sector, while counting
  History history;
};

// One reserved range of addresses; what is not a buffer in it faults.
class Memory {
 public:
  void* allocate(const char* name, size_t bytes) {
    if (area_ == nullptr) reserve();
    const size_t padded = (bytes + 15) / 16 * 16, mapped = std::max(round_up(padded, 4096), size_t{4096});
    char* mapping = next_;
    next_ += round_up(mapped + kGuardBytes, 4096);
    if (next_ > area_ + kAreaBytes || mprotect(mapping, mapped, PROT_READ | PROT_WRITE) != 0) return nullptr;
    if (bytes < kVast) std::memset(mapping, kPoison, mapped);
    char* begin = mapping + mapped - padded;
    buffers_.emplace(begin, Buffer{name, begin, bytes, mapping, mapped, true, {}, {}, {}});
    return begin;
  }

  void protect(void* pointer) {
    Buffer& buffer = buffers_.at(static_cast<char*>(pointer));
    buffer.writable = false;
    mprotect(buffer.mapping, buffer.mapped, PROT_READ);
  }

  // Empties the area; gives the name of a buffer whose surroundings within its pages were overwritten, or nothing.
  std::string release() {
    std::string damaged;
    const auto untouched = [](char value) { return static_cast<unsigned char>(value) == kPoison; };
    for (auto& [begin, buffer] : buffers_) {
      const bool clean =
          buffer.bytes >= kVast || (std::all_of(buffer.mapping, begin, untouched) &&
                                    std::all_of(begin + buffer.bytes, buffer.mapping + buffer.mapped, untouched));
      if (!clean) damaged = buffer.name;
      madvise(buffer.mapping, buffer.mapped, MADV_DONTNEED);
      mprotect(buffer.mapping, buffer.mapped, PROT_NONE);
    }
    buffers_.clear();
    next_ = area_ + kGuardBytes;
    return damaged;
  }

  bool contains(const void* pointer) const {
    const auto* p = static_cast<const char*>(pointer);
    return area_ <= p && p < area_ + kAreaBytes && area_ != nullptr;
  }

  // The buffer at or before an address, null if there is none; `pointer` may lie past its end.
  Buffer* nearest(const void* pointer) {
    auto after = buffers_.upper_bound(const_cast<char*>(static_cast<const char*>(pointer)));
    return after == buffers_.begin() ? nullptr : &std::prev(after)->second;
  }

  // The same for an address before the first byte of the buffer that it is meant to be in.
  Buffer* next(const void* pointer) {
    auto after = buffers_.upper_bound(const_cast<char*>(static_cast<const char*>(pointer)));
    return after == buffers_.end() ? nullptr : &after->second;
  }

 private:
  static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

  void reserve() {
    void* mapping = mmap(nullptr, kAreaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) std::abort();
    area_ = static_cast<char*>(mapping);
    next_ = area_ + kGuardBytes;
  }

  char *area_ = nullptr, *next_ = nullptr;
  std::map<char*, Buffer> buffers_;
};

}  // namespace emu
