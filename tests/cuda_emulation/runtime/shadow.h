// Who touched each byte of shared memory, and when: finds accesses that no barrier orders, whatever order they ran in.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

namespace emu {

constexpr unsigned kWarp = 32, kMaxWarps = 32;

using Intervals = std::array<uint32_t, kMaxWarps>;  // of each warp

// What a block's thread `by` was ordered after when it took a ticket.
struct Passed {
  Intervals seen;
  uint16_t by;
};

// Time is counted a warp: each barrier that a warp takes part in begins a new interval. seen[w][v] is the interval of
// warp v up to which w is ordered after it.
class Clocks {
 public:
  Clocks() {
    for (unsigned w = 0; w < kMaxWarps; ++w) seen_[w].fill(0), seen_[w][w] = 1;
  }

  uint32_t now(unsigned warp) const { return seen_[warp][warp]; }

  bool ordered(unsigned before, uint32_t interval, unsigned warp) const { return interval < seen_[warp][before]; }

  // The same of a thread of another block: by tickets, which a block passes on to the next one that takes one.
  bool ordered(uint32_t block, uint16_t before, uint32_t interval, unsigned warp) const {
    const auto found = foreign_[warp].find(block);
    if (found == foreign_[warp].end()) return false;
    const Passed& passed = found->second;
    return interval < passed.seen[before / kWarp] || (before == passed.by && interval == passed.seen[before / kWarp]);
  }

  // A thread of this block takes a ticket: it learns what those who took one before knew, and passes on what it knows.
  void ticket(uint32_t block, uint16_t thread, std::map<uint32_t, Passed>& passed) {
    const unsigned warp = thread / kWarp;
    for (const auto& [other, what] : passed) foreign_[warp][other] = what;
    passed = foreign_[warp];
    passed[block] = {seen_[warp], thread};
    ++seen_[warp][warp];  // what the warp does from now on is not passed on
  }

  // A barrier among the warps whose bit is set.
  void join(uint32_t warps) {
    Intervals all{};
    for (unsigned w = 0; w < kMaxWarps; ++w)
      for (unsigned v = 0; v < kMaxWarps; ++v)
        if (warps >> w & 1) all[v] = std::max(all[v], seen_[w][v]);
    for (unsigned w = 0; w < kMaxWarps; ++w)
      if (warps >> w & 1) ++all[w];
    std::map<uint32_t, Passed> foreign;
    for (unsigned w = 0; w < kMaxWarps; ++w)
      if (warps >> w & 1) foreign.insert(foreign_[w].begin(), foreign_[w].end());
    for (unsigned w = 0; w < kMaxWarps; ++w)
      if (warps >> w & 1) seen_[w] = all, foreign_[w] = foreign;
  }

 private:
  std::array<Intervals, kMaxWarps> seen_;
  std::array<std::map<uint32_t, Passed>, kMaxWarps> foreign_;  // by block, what a warp has from tickets
};

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
