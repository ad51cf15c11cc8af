// A block: its fibers, its shared memory, and who waits for whom.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_emulation/emulation.h"
#include "cuda_emulation/runtime/fiber.h"
#include "cuda_emulation/runtime/memory.h"
#include "cuda_emulation/runtime/shadow.h"

namespace emu {

constexpr size_t kTurns = 64;

enum class State { ready, running, barrier, collective, grid, exited };

struct Copy {
  char* shared;
  const char* global;
  int bytes, valid;
  bool landed;
};

struct Fiber {
  Context context{};
  char* stack = nullptr;
  State state = State::ready;
  int barrier = 0, barrier_threads = 0, vote = 0;  // while it waits at one
  unsigned mask = 0;                               // while it waits in a collective
  const char* what = nullptr;
  unsigned line = 0;
  Complete complete = nullptr;
  void* request = nullptr;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Grid {
  LaunchConfig config;
  const void* kernel;
  std::function<void()> body;
};

class Block {
 public:
  Block(const Grid& grid, uint3 index, bool early);
  ~Block();

  // Runs until all threads have exited, another block is to go on, or, for an early block, none of its threads can
  // before the grid ahead has ended. False after a failure.
  bool run();

  void allow_grid();  // the grid ahead has ended

  bool finished() const { return live_ == 0; }
  bool waited() const { return waited_; }
  unsigned threads() const { return static_cast<unsigned>(fibers_.size()); }

  // What device code asks for, in the running fiber.
  void collective(unsigned mask, const char* what, Complete complete, void* request, unsigned line = 0);
  void barrier(int id, int threads, unsigned line);
  int vote(int value, int what, unsigned line);
  void exit_thread();
  void wait_for_grid();
  void cp_async(char* shared, const char* global, int bytes, int valid);
  void cp_async_commit();
  void cp_async_wait(int newest);
  void touch(const char* pointer, size_t bytes, Access kind, const void* where);
  void ticket(const void* counter);

  void give_way();  // other threads and blocks may go on before the running one does

  // What the running thread does now, and whether it is ordered after what some did to global memory in this launch.
  Touch touch_now(Access kind) const;
  bool ordered(const Touch& before) const;

  // What an early block reads, by granule, and when: neither the launches ahead nor blocks beside it must write it.
  bool early() const { return early_; }
  std::unordered_map<uintptr_t, Touch>& early_reads() { return early_reads_; }
  uint32_t serial() const { return serial_; }
  unsigned current() const { return current_; }
  unsigned active(unsigned warp) const;
  char* dynamic() const { return dynamic_; }
  bool near_dynamic(const char* p) const { return mapping_ <= p && p < mapping_ + mapped_; }
  bool in_shared(const void* pointer) const { return shadow_of(static_cast<const char*>(pointer)) != nullptr; }
  Clocks& clocks() { return clocks_; }

 private:
  // The running fiber stops; its state says why. One time in so many it leaves the turn to another block, too.
  void yield(size_t turns = kTurns);
  int pick();  // a ready fiber at random, -1 without one
  void enter(unsigned thread);
  void wake(unsigned thread);
  bool try_complete(unsigned thread);
  bool try_release(int id);
  std::string where_all_wait() const;
  void land(Copy& copy);
  Shadow* shadow_of(const char* pointer, size_t* at = nullptr) const;
  void report(Conflict conflict, const char* pointer, unsigned other, const void* where);

  const Grid& grid_;
  uint3 index_;
  uint32_t serial_;
  bool early_, waited_ = false;
  std::unordered_map<uintptr_t, Touch> early_reads_;
  unsigned live_, current_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> ready_;
  Context scheduler_{};
  Clocks clocks_;
  int result_[3] = {};  // of the last vote: count, and, or
  char *mapping_ = nullptr, *dynamic_ = nullptr;
  size_t mapped_ = 0;
  std::vector<unsigned char> static_image_;  // while another block runs
  std::unique_ptr<Shadow> dynamic_shadow_, static_shadow_;
};

}  // namespace emu
