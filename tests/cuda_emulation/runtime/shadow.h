// Who touched each byte of shared memory, and when: finds accesses that no barrier orders, whatever order they ran in.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_emulation/runtime/clocks.h"

namespace emu {

constexpr uint16_t kNobody = 0xFFFF;

// The last write of a byte, the last two lanes of a warp that read it since, and the last reader of another warp.
struct Cell {
  uint32_t write_time = 0, read_time[3] = {};
  uint16_t writer = kNobody, reader[3] = {kNobody, kNobody, kNobody};
  bool atomic = false, in_flight = false;
};

enum class Conflict { none, write_after_write, write_after_read, read_after_write, in_flight };

class Shadow {
 public:
  explicit Shadow(size_t bytes) : cells_(bytes) {}

  size_t size() const { return cells_.size(); }

  Conflict write(size_t at, uint16_t thread, const Clocks& clocks, bool atomic, uint16_t* other) {
    Cell& cell = cells_[at];
    if (cell.in_flight) return *other = cell.writer, Conflict::in_flight;
    if (!(atomic && cell.atomic) && unordered(cell.writer, cell.write_time, thread, clocks))
      return *other = cell.writer, Conflict::write_after_write;
    for (int i = 0; i < 3; ++i)
      if (unordered(cell.reader[i], cell.read_time[i], thread, clocks))
        return *other = cell.reader[i], Conflict::write_after_read;
    cell = written(thread, clocks, atomic);
    return Conflict::none;
  }

  Conflict read(size_t at, uint16_t thread, const Clocks& clocks, uint16_t* other) {
    Cell& cell = cells_[at];
    if (cell.in_flight) return *other = cell.writer, Conflict::in_flight;
    if (unordered(cell.writer, cell.write_time, thread, clocks))
      return *other = cell.writer, Conflict::read_after_write;
    const uint32_t now = clocks.now(thread / kWarp);
    if (cell.reader[0] == kNobody || cell.reader[0] / kWarp != thread / kWarp) {
      cell.reader[2] = cell.reader[0], cell.read_time[2] = cell.read_time[0];
      cell.reader[1] = kNobody;
    } else if (cell.read_time[0] != now) {
      cell.reader[1] = kNobody;  // within a warp the later interval subsumes the earlier one
    } else if (cell.reader[0] != thread) {
      cell.reader[1] = cell.reader[0], cell.read_time[1] = now;
    }
    cell.reader[0] = thread, cell.read_time[0] = now;
    return Conflict::none;
  }

  void begin_flight(size_t at) { cells_[at].in_flight = true; }

  void end_flight(size_t at, uint16_t thread, const Clocks& clocks) { cells_[at] = written(thread, clocks, false); }

 private:
  static Cell written(uint16_t thread, const Clocks& clocks, bool atomic) {
    Cell cell;
    cell.write_time = clocks.now(thread / kWarp), cell.writer = thread, cell.atomic = atomic;
    return cell;
  }

  static bool unordered(uint16_t before, uint32_t time, uint16_t thread, const Clocks& clocks) {
    return before != kNobody && before != thread && !clocks.ordered(before / kWarp, time, thread / kWarp);
  }

  std::vector<Cell> cells_;
};

}  // namespace emu
