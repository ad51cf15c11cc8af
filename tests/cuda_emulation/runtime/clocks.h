// What a thread is ordered after: in its block by barriers, in other blocks by tickets.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>

#include "cuda_emulation/emulation.h"

namespace emu {

constexpr unsigned kWarp = 32, kMaxWarps = 32;

// What lanes of a warp did to global memory in one interval.
struct Touch {
  uint32_t block, interval, lanes;
  uint16_t warp;
  Access kind;
};

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

  // The same of lanes of another block: by tickets, which a block passes on to the next one that takes one.
  bool ordered(const Touch& before, unsigned warp) const {
    const auto found = foreign_[warp].find(before.block);
    if (found == foreign_[warp].end()) return false;
    const auto& [seen, by] = found->second;
    const uint32_t known = seen[before.warp];
    return before.interval < known ||
           (before.interval == known && before.warp == by / kWarp && before.lanes == 1u << by % kWarp);
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

}  // namespace emu
