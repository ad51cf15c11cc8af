#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda_emulation/runtime/machine.h"

namespace emu {

inline uint3 unflatten(unsigned i, const dim3& size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

inline void fiber_main() {
  machine.running_grid->body();
  machine.running->exit_thread();
}

inline Block::Block(const Grid& grid, uint3 index, bool early) : grid_(grid), index_(index), early_(early) {
  const dim3& size = grid.config.block;
  live_ = size.x * size.y * size.z;
  fibers_.resize(live_);
  for (unsigned t = 0; t < live_; ++t) {
    fibers_[t].stack = machine.stacks.take();
    make_context(fibers_[t].context, fibers_[t].stack, fiber_main);
    ready_.push_back(t);
  }
  const size_t bytes = grid.config.shared, padded = (bytes + 127) / 128 * 128;
  const size_t pages = (padded + kPage - 1) / kPage * kPage;
  mapped_ = pages + 2 * kPage;
  mapping_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mprotect(mapping_ + kPage, pages, PROT_READ | PROT_WRITE) != 0) std::abort();
  std::memset(mapping_ + kPage, kPoison, pages);
  dynamic_ = mapping_ + kPage + pages - padded;
  dynamic_shadow_ = std::make_unique<Shadow>(bytes);
  static_shadow_ = std::make_unique<Shadow>(machine.static_bytes);
  static_image_.assign(machine.static_bytes, kPoison);
  serial_ = ++machine.block_serial;
}

inline Block::~Block() {
  for (const Fiber& fiber : fibers_) machine.stacks.give_back(fiber.stack);
  munmap(mapping_, mapped_);
}

inline bool Block::run() {
  std::memcpy(machine.static_shared, static_image_.data(), static_image_.size());
  machine.running = this, machine.running_grid = &grid_;
  if (sigsetjmp(machine.failed, 1) != 0) {
    machine.running = nullptr;
    return false;
  }
  const int first = pick();
  if (first >= 0) {
    enter(static_cast<unsigned>(first));
    switch_context(scheduler_, fibers_[first].context);
  }
  if (live_ > 0 && !early_ && ready_.empty()) fail("the block hangs: %s", where_all_wait().c_str());
  machine.running = nullptr;
  std::memcpy(static_image_.data(), machine.static_shared, static_image_.size());
  return true;
}

inline void Block::allow_grid() {
  early_ = false;
  for (unsigned t = 0; t < threads(); ++t)
    if (fibers_[t].state == State::grid) wake(t);
}

inline int Block::pick() {
  if (ready_.empty()) return -1;
  std::swap(ready_[machine.draw(ready_.size())], ready_.back());
  const unsigned thread = ready_.back();
  ready_.pop_back();
  return static_cast<int>(thread);
}

inline void Block::enter(unsigned thread) {
  current_ = thread;
  fibers_[thread].state = State::running;
  threadIdx = unflatten(thread, grid_.config.block);
  blockIdx = index_, blockDim = grid_.config.block, gridDim = grid_.config.grid;
}

inline void Block::wake(unsigned thread) {
  fibers_[thread].state = State::ready;
  ready_.push_back(thread);
}

inline void Block::yield(size_t turns) {
  const unsigned self = current_;
  const int next = !early_ && machine.draw(turns) == 0 ? -1 : pick();
  if (next < 0) return switch_context(fibers_[self].context, scheduler_);
  enter(static_cast<unsigned>(next));
  if (static_cast<unsigned>(next) != self) switch_context(fibers_[self].context, fibers_[next].context);
}

inline void Block::give_way() {
  wake(current_);
  yield(2);
}

inline void Block::exit_thread() {
  fibers_[current_].state = State::exited;
  --live_;
  const unsigned first = current_ / kWarp * kWarp;
  for (unsigned t = first; t < std::min(first + kWarp, threads()); ++t)
    if (fibers_[t].state == State::collective) try_complete(t);
  try_release(0);
  yield();
}

inline unsigned Block::active(unsigned warp) const {
  unsigned mask = 0;
  for (unsigned l = 0; l < kWarp && warp * kWarp + l < threads(); ++l)
    if (fibers_[warp * kWarp + l].state != State::exited) mask |= 1u << l;
  return mask;
}

inline void Block::collective(unsigned mask, const char* what, Complete complete, void* request, unsigned line) {
  if (!(mask >> (current_ % kWarp) & 1)) fail("%s with mask 0x%08x, which leaves the caller out", what, mask);
  Fiber& self = fibers_[current_];
  self.state = State::collective;
  self.mask = mask, self.what = what, self.complete = complete, self.request = request, self.line = line;
  try_complete(current_);
  yield();
}

inline bool Block::try_complete(unsigned thread) {
  const unsigned mask = fibers_[thread].mask, first = thread / kWarp * kWarp;
  const unsigned lanes = mask & active(thread / kWarp);
  const Complete complete = fibers_[thread].complete;
  void* requests[kWarp] = {};
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(lanes >> l & 1)) continue;
    const Fiber& other = fibers_[first + l];
    if (other.state != State::collective || other.complete != complete || other.mask != mask) return false;
    if (other.line != fibers_[thread].line)  // one instruction for the whole warp, not two that look alike
      fail("%s by lanes of one warp at different lines, %u and %u", other.what, other.line, fibers_[thread].line);
    requests[l] = other.request;
  }
  complete(requests, lanes);
  for (unsigned l = 0; l < kWarp; ++l)
    if (lanes >> l & 1) wake(first + l);
  return true;
}

inline void Block::barrier(int id, int threads, unsigned line) {
  Fiber& self = fibers_[current_];
  self.state = State::barrier;
  self.barrier = id, self.barrier_threads = threads, self.line = line;
  try_release(id);
  yield();
}

inline bool Block::try_release(int id) {
  unsigned there = 0, wanted = live_, yes = 0, lines[2] = {~0u, 0};  // the least and the greatest
  uint32_t warps = 0;
  for (unsigned t = 0; t < threads(); ++t) {
    const Fiber& fiber = fibers_[t];
    if (fiber.state != State::barrier || fiber.barrier != id) continue;
    if (id != 0) wanted = static_cast<unsigned>(fiber.barrier_threads);
    ++there, yes += fiber.vote != 0, warps |= 1u << t / kWarp;
    lines[0] = std::min(lines[0], fiber.line), lines[1] = std::max(lines[1], fiber.line);
  }
  if (there == 0 || there < wanted) return false;
  if (lines[0] != lines[1]) fail("barrier %d by threads of one block at lines %u and %u", id, lines[0], lines[1]);
  result_[0] = static_cast<int>(yes), result_[1] = yes == there, result_[2] = yes > 0;
  clocks_.join(warps);
  for (unsigned t = 0; t < threads(); ++t)
    if (fibers_[t].state == State::barrier && fibers_[t].barrier == id) wake(t);
  return true;
}

inline int Block::vote(int value, int what, unsigned line) {
  fibers_[current_].vote = value;
  barrier(0, 0, line);
  return result_[what];
}

inline void Block::wait_for_grid() {
  waited_ = true;
  if (!early_) return;
  fibers_[current_].state = State::grid;
  yield();
}

inline std::string Block::where_all_wait() const {
  std::map<std::string, std::pair<unsigned, unsigned>> places;  // count, an example
  for (unsigned t = 0; t < threads(); ++t) {
    const Fiber& fiber = fibers_[t];
    char text[128] = "?";
    if (fiber.state == State::exited) continue;
    if (fiber.state == State::barrier) std::snprintf(text, sizeof text, "at barrier %d", fiber.barrier);
    if (fiber.state == State::collective)
      std::snprintf(text, sizeof text, "in %s with mask 0x%08x", fiber.what, fiber.mask);
    auto& [count, example] = places[text];
    ++count, example = t;
  }
  std::string all;
  for (const auto& [text, place] : places) {
    all += (all.empty() ? "" : ", ") + std::to_string(place.first) + " threads wait " + text + " (thread " +
           std::to_string(place.second) + " is one)";
  }
  return all + ", " + std::to_string(threads() - live_) + " have exited";
}

inline Shadow* Block::shadow_of(const char* pointer, size_t* at) const {
  const auto within = [&](const char* begin, Shadow* shadow) {
    if (pointer < begin || pointer >= begin + shadow->size()) return false;
    if (at != nullptr) *at = static_cast<size_t>(pointer - begin);
    return true;
  };
  if (within(dynamic_, dynamic_shadow_.get())) return dynamic_shadow_.get();
  return within(machine.static_shared, static_shadow_.get()) ? static_shadow_.get() : nullptr;
}

inline void Block::touch(const char* pointer, size_t bytes, Access kind, const void* where) {
  if (machine.stacks.contains(pointer)) return;
  size_t at = 0;
  Shadow* shadow = shadow_of(pointer, &at);
  if (shadow == nullptr) {
    if (mapping_ <= pointer && pointer < mapping_ + mapped_)
      machine.error_at = where, fail("%s", describe_address(pointer).c_str());
    return;
  }
  if (at + bytes > shadow->size()) machine.error_at = where, fail("%s", describe_address(pointer + bytes - 1).c_str());
  const auto thread = static_cast<uint16_t>(current_);
  for (size_t i = 0; i < bytes; ++i) {
    uint16_t other = kNobody;
    const Conflict conflict = kind == Access::read
                                  ? shadow->read(at + i, thread, clocks_, &other)
                                  : shadow->write(at + i, thread, clocks_, kind == Access::atomic, &other);
    if (conflict != Conflict::none) report(conflict, pointer, other, where);
  }
}

inline void Block::ticket(const void* counter) {
  clocks_.ticket(serial_, static_cast<uint16_t>(current_), machine.tickets[counter]);
}

inline Touch Block::touch_now(Access kind) const {
  const unsigned warp = current_ / kWarp;
  return {serial_, clocks_.now(warp), 1u << current_ % kWarp, static_cast<uint16_t>(warp), kind};
}

inline bool Block::ordered(const Touch& before) const {
  const unsigned warp = current_ / kWarp;
  if (before.block != serial_) return clocks_.ordered(before, warp);
  const bool own = before.warp == warp && before.lanes == 1u << current_ % kWarp;
  return own || clocks_.ordered(before.warp, before.interval, warp);
}

inline void Block::report(Conflict conflict, const char* pointer, unsigned other, const void* where) {
  const char* what = "";
  switch (conflict) {
    case Conflict::write_after_write:
      what = "writes shared memory that thread %u wrote";
      break;
    case Conflict::write_after_read:
      what = "writes shared memory that thread %u reads";
      break;
    case Conflict::read_after_write:
      what = "reads shared memory that thread %u wrote";
      break;
    case Conflict::in_flight:
      what = "touches shared memory that a cp.async of thread %u is still filling";
      break;
    case Conflict::none:
      return;
  }
  char text[160];
  std::snprintf(text, sizeof text, what, other);
  machine.error_at = where;
  fail("%s, with no barrier between (%s)", text, describe_address(pointer).c_str());
}

inline void Block::cp_async(char* shared, const char* global, int bytes, int valid) {
  const auto at = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (at % bytes != 0 || from % bytes != 0)
    fail("cp.async of %d bytes from %p to %p, misaligned", bytes, global, shared);
  if (valid < 0 || valid > bytes) fail("cp.async of %d of %d bytes", valid, bytes);
  if (!in_shared(shared) || !in_shared(shared + bytes - 1))
    fail("cp.async to %s", describe_address(shared + bytes - 1).c_str());
  size_t offset = 0;
  Shadow* shadow = shadow_of(shared, &offset);
  touch(shared, static_cast<size_t>(bytes), Access::write, nullptr);
  for (int i = 0; i < bytes; ++i) shadow->begin_flight(offset + static_cast<size_t>(i));
  Copy copy{shared, global, bytes, valid, false};
  if (machine.draw(2) == 0) land(copy);  // the hardware may deliver at once, or at the wait
  fibers_[current_].open.push_back(copy);
}

inline void Block::land(Copy& copy) {
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid));
  std::memset(copy.shared + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
  copy.landed = true;
}

inline void Block::cp_async_commit() {
  Fiber& self = fibers_[current_];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

inline void Block::cp_async_wait(int newest) {
  auto& groups = fibers_[current_].groups;
  while (groups.size() > static_cast<size_t>(newest)) {
    for (Copy& copy : groups.front()) {
      if (!copy.landed) land(copy);
      size_t at = 0;
      Shadow* shadow = shadow_of(copy.shared, &at);
      for (int i = 0; i < copy.bytes; ++i)
        shadow->end_flight(at + static_cast<size_t>(i), static_cast<uint16_t>(current_), clocks_);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emu
