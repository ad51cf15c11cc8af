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

// Of one granule: the last write and the atomics since, then the reads since.
class Granule {
 public:
  // Adds a touch to those of its launch. The one before that it must not meet, if it is not ordered after that, or
  // null.
  template <class Ordered>
  const Touch* add(uint32_t launch, const Touch& now, Ordered ordered) {
    if (launch_ != launch) launch_ = launch, touches_.clear(), changes_ = 0;
    const size_t met = now.kind == Access::read ? changes_ : touches_.size();
    for (size_t i = 0; i < met; ++i) {
      const bool both_atomic = now.kind == Access::atomic && touches_[i].kind == Access::atomic;
      if (!both_atomic && !ordered(touches_[i])) return &touches_[i];
    }
    if (now.kind == Access::read) add_read(now);
    if (now.kind == Access::atomic) touches_.insert(touches_.begin() + changes_++, now);
    // What is ordered after a write is so after all before it.
    if (now.kind == Access::write) touches_.assign(1, now), changes_ = 1;
    return nullptr;
  }

 private:
  // What is ordered after a warp's later interval is so after an earlier one. Looked for among the last few: a second
  // note of the same warp does no harm.
  void add_read(const Touch& now) {
    constexpr size_t kFew = 4;
    for (size_t i = touches_.size(); i > changes_ && i + kFew > touches_.size(); --i) {
      Touch& own = touches_[i - 1];
      if (own.block != now.block || own.warp != now.warp) continue;
      own.lanes = own.interval == now.interval ? own.lanes | now.lanes : now.lanes;
      own.interval = now.interval;
      return;
    }
    touches_.push_back(now);
  }

  uint32_t launch_ = 0, changes_ = 0;
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
