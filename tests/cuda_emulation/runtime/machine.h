// The one emulated device: its memory, the launch that has not run yet, and the first thing that went wrong.
#pragma once

#include <csetjmp>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulation/runtime/block.h"

namespace emu {

// A launch that has not run: it runs when too many wait, or at a synchronisation.
struct Launch {
  std::unique_ptr<Grid> grid;
  std::unique_ptr<Block> early;  // a block of it that ran ahead of the launches before
  unsigned early_index = 0;
};

struct Machine {
  Stacks stacks;
  Memory memory;
  std::mt19937_64 random;
  int major = 9;
  bool counting = false, last_block = false;  // what a call wants
  std::string error;
  const void* error_at = nullptr;

  Block* running = nullptr;
  const Grid* running_grid = nullptr;
  sigjmp_buf failed;

  std::deque<Launch> pending;
  std::map<const void*, std::map<uint32_t, Passed>> tickets;  // of the launch that runs: by counter, what it passes on

  // Of each kernel on each device, from call to call, as a driver keeps them; and how often one was set.
  std::map<std::pair<const void*, int>, size_t> shared_limit;
  std::map<std::pair<const void*, int>, int> carveout;
  unsigned attributes_set = 0;
  int last_carveout = -1;  // of the launch before; -1 for the driver's choice
  std::map<const void*, unsigned> launches;
  std::map<std::pair<const void*, std::string>, Traffic> traffic;
  uint32_t block_serial = 0, launch_serial = 0;

  char* static_shared = nullptr;  // the thread-local storage of this library: what is __shared__ in a kernel
  size_t static_bytes = 0;

  unsigned draw(size_t below) { return static_cast<unsigned>(random() % below); }
};

extern Machine machine;

void set_error(std::string message, const void* where);
std::string describe_address(const void* pointer);

}  // namespace emu
