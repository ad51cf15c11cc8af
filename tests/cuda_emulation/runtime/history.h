// Who touched global memory in a launch, and when: finds accesses of two threads that nothing orders, whatever order
// they ran in.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_emulation/runtime/clocks.h"

namespace emu {

constexpr size_t kGranule = 2;  // bytes: the smallest that two blocks of a kernel here write beside each other

// Of one granule: the last write, and since then the atomics and the last reads of each warp.
class Granule {
 public:
  // Adds a touch to those of its launch. The one before that it must not meet, if it is not ordered after that, or
  // null.
  template <class Ordered>
  const Touch* add(uint32_t launch, const Touch& now, Ordered ordered) {
    if (launch_ != launch) launch_ = launch, touches_.clear();
    Touch* own = nullptr;
    for (auto before = touches_.rbegin(); before != touches_.rend(); ++before) {
      if (before->kind != now.kind || now.kind == Access::write) {
        if (!ordered(*before)) return &*before;
      } else if (now.kind == Access::read && before->block == now.block && before->warp == now.warp) {
        own = &*before;
        if (own->interval < now.interval) own->lanes = 0;  // who is ordered after the later one is so after both
        if (own->interval < now.interval || (own->lanes & now.lanes) != 0) break;  // the rest was looked at before
      }
    }
    if (now.kind == Access::write) touches_.clear();  // who is ordered after the write is so after these
    if (own == nullptr) return touches_.push_back(now), nullptr;
    own->interval = now.interval, own->lanes |= now.lanes;
    return nullptr;
  }

 private:
  uint32_t launch_ = 0;
  std::vector<Touch> touches_;
};

// Of a buffer; pages of it exist once they are touched.
class History {
 public:
  Granule& at(size_t granule) {
    if (granule / kPageGranules >= pages_.size()) pages_.resize(granule / kPageGranules + 1);
    auto& page = pages_[granule / kPageGranules];
    if (page == nullptr) page = std::make_unique<Page>();
    return (*page)[granule % kPageGranules];
  }

 private:
  static constexpr size_t kPageGranules = 512;
  using Page = std::array<Granule, kPageGranules>;
  std::vector<std::unique_ptr<Page>> pages_;
};

}  // namespace emu
