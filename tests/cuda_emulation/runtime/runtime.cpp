// The runtime of the stand-in. Compiled once a library, without instrumentation: what it does is not device code.
#include <dlfcn.h>
#include <link.h>
#include <signal.h>

#include <cstdarg>
#include <numeric>
#include <sstream>

#include "cuda_emulation/runtime/block_impl.h"

emu::uint3 threadIdx, blockIdx;
emu::dim3 blockDim, gridDim;

namespace emu {

Machine machine;

namespace {

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t
constexpr size_t kDefaultShared = 48 * 1024;
// A dependent launch may begin while the one ahead waits for the one before it, and so on.
constexpr size_t kMostPending = 3;
// Blocks of a grid that take turns.
constexpr size_t kResident = 3;

thread_local volatile char static_shared_marker;  // written to, so that the storage exists

int find_static_shared(dl_phdr_info* info, size_t, void*) {
  const auto self = reinterpret_cast<uintptr_t>(&machine);
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD) ours |= begin <= self && self < begin + header.p_memsz;
    if (header.p_type == PT_TLS) bytes = header.p_memsz;
  }
  if (!ours) return 0;
  machine.static_shared = static_cast<char*>(info->dlpi_tls_data);
  machine.static_bytes = bytes;
  return 1;
}

uintptr_t library_base() {
  Dl_info info{};
  dladdr(&machine, &info);
  return reinterpret_cast<uintptr_t>(info.dli_fbase);
}

// An address in the library, for the Python side to turn into a name or a line.
std::string mark(const char* kind, const void* address) {
  std::ostringstream text;
  text << '{' << kind << ":0x" << std::hex << reinterpret_cast<uintptr_t>(address) - library_base() << '}';
  return text.str();
}

std::string triple(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (machine.running == nullptr) {  // not a kernel's doing: let it happen again without us
    signal(number, SIG_DFL);
    return;
  }
#if defined(__x86_64__)
  const auto* registers = static_cast<ucontext_t*>(context);
  machine.error_at = reinterpret_cast<void*>(registers->uc_mcontext.gregs[REG_RIP]);
#else
  (void)context;
#endif
  if (number == SIGFPE) fail("integer division by zero");
  fail("%s", describe_address(info->si_addr).c_str());
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction old_actions[3];
stack_t old_stack;
char signal_stack[64 * 1024];

void catch_signals() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  for (int i = 0; i < 3; ++i) {
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(kSignals[i], &action, &old_actions[i]);
  }
}

void release_signals() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

bool run_block(Block& block, const Grid& grid) {
  if (!block.run()) return false;
  if (block.finished() && grid.config.dependent && !block.waited()) {
    set_error("kernel " + mark("fn", grid.kernel) +
                  ": launched as dependent, but a block ended without dependency_wait(), so the kernel after it could "
                  "overtake the one before it",
              nullptr);
    return false;
  }
  return true;
}

// Puts what a block has read ahead before all that its grid does.
void recall(Block& early) {
  for (const auto& [granule, touch] : early.early_reads()) {
    Buffer& buffer = *machine.memory.nearest(reinterpret_cast<const char*>(granule * kGranule));
    const size_t at = granule - reinterpret_cast<uintptr_t>(buffer.begin) / kGranule;
    if (buffer.bytes < kVast)
      buffer.history.at(at).add(machine.launch_serial, touch, [](const Touch&) { return true; });
  }
}

void run_grid(const Grid& grid, std::unique_ptr<Block> early, unsigned early_index) {
  const dim3& size = grid.config.grid;
  std::vector<unsigned> order(static_cast<size_t>(size.x) * size.y * size.z);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.last_block) order = {order.back()};
  std::shuffle(order.begin(), order.end(), machine.random);
  ++machine.launches[grid.kernel];
  if (early != nullptr) recall(*early);
  const size_t most = machine.counting ? 1 : kResident;  // sectors are counted block by block
  std::vector<std::unique_ptr<Block>> resident;
  for (auto next = order.begin(); next != order.end() || !resident.empty();) {
    if (next != order.end() && resident.size() < most) {
      const unsigned i = *next++;
      if (early != nullptr && i == early_index)
        early->allow_grid(), resident.push_back(std::move(early));
      else
        resident.push_back(std::make_unique<Block>(grid, unflatten(i, size), false));
      continue;
    }
    auto& block = resident[machine.draw(resident.size())];
    if (!run_block(*block, grid)) return;
    if (block->finished()) std::swap(block, resident.back()), resident.pop_back();
  }
}

// Two accesses that nothing orders, in words.
const char* unordered(Access kind, const Touch& before, const Block& block) {
  static constexpr const char *kNow[] = {"reads", "writes", "updates"}, *kBefore[] = {"has read", "wrote", "updated"};
  static std::string text;
  text = std::string(kNow[static_cast<int>(kind)]) + " what another " +
         (before.block == block.serial() ? "thread " : "block ") + kBefore[static_cast<int>(before.kind)] +
         ", with no barrier and no ticket between: ";
  return text.c_str();
}

// What the block that runs does to global memory, seen with what the blocks beside it and the launches after it did.
const char* check_order(Buffer& buffer, const char* p, size_t bytes, Access kind) {
  if (!buffer.writable) return nullptr;
  Block& block = *machine.running;
  const Touch now = block.touch_now(kind);
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / kGranule;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / kGranule;
  if (block.early()) {
    if (kind != Access::read) return "before dependency_wait(), writes ";
    for (uintptr_t granule = first; granule <= last; ++granule) block.early_reads().insert_or_assign(granule, now);
    return nullptr;
  }
  if (kind != Access::read)
    for (const Launch& later : machine.pending)
      for (uintptr_t granule = first; granule <= last; ++granule)
        if (later.early != nullptr && later.early->early_reads().count(granule) != 0)
          return "writes what a launch after it has read before its dependency_wait(): ";
  if (buffer.bytes >= kVast) return nullptr;
  const uintptr_t base = reinterpret_cast<uintptr_t>(buffer.begin) / kGranule;
  const auto ordered = [&](const Touch& before) { return block.ordered(before); };
  for (uintptr_t granule = first; granule <= last; ++granule)
    if (const Touch* other = buffer.history.at(granule - base).add(machine.launch_serial, now, ordered))
      return unordered(kind, *other, block);
  return nullptr;
}

const char* check_global(const char* p, size_t bytes, Access kind, std::string* text) {
  Buffer* buffer = machine.memory.nearest(p);
  const bool inside = buffer != nullptr && p >= buffer->begin && p + bytes <= buffer->begin + buffer->bytes;
  if (!inside) return *text = describe_address(p), "touches ";
  if (kind != Access::read && !buffer->writable) return *text = describe_address(p), "writes an input: ";
  if (machine.running != nullptr)
    if (const char* problem = check_order(*buffer, p, bytes, kind)) return *text = describe_address(p), problem;
  if (!machine.counting || machine.running == nullptr) return nullptr;
  Traffic& traffic = machine.traffic[{machine.running_grid->kernel, buffer->name}];
  (kind == Access::read ? traffic.requested : traffic.written) += bytes;
  if (kind != Access::read) return nullptr;
  if (buffer->block_stamp.empty()) {
    buffer->block_stamp.assign(buffer->bytes / kSectorBytes + 1, 0);
    buffer->launch_stamp = buffer->block_stamp;
  }
  for (size_t s = (p - buffer->begin) / kSectorBytes; s <= (p - buffer->begin + bytes - 1) / kSectorBytes; ++s) {
    if (std::exchange(buffer->block_stamp[s], machine.running->serial()) != machine.running->serial())
      traffic.by_block += kSectorBytes;
    if (std::exchange(buffer->launch_stamp[s], machine.launch_serial) != machine.launch_serial)
      traffic.distinct += kSectorBytes;
  }
  return nullptr;
}

}  // namespace

void set_error(std::string message, const void* where) {
  if (!machine.error.empty()) return;
  machine.error = std::move(message);
  if (where != nullptr) machine.error += ", at " + mark("pc", where);
}

void fail(const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  const void* where = std::exchange(machine.error_at, nullptr);
  set_error("kernel " + mark("fn", machine.running_grid->kernel) + ", block " + triple(blockIdx) + ", thread " +
                triple(threadIdx) + ": " + text,
            where != nullptr ? where : __builtin_return_address(0));
  siglongjmp(machine.failed, 1);
}

std::string describe_address(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  const auto relative = [&](const std::string& name, const char* begin, size_t bytes) {
    const long long offset = p - begin;
    return "byte " + std::to_string(offset) + " of " + name + ", which has " + std::to_string(bytes);
  };
  if (machine.memory.contains(p)) {
    const Buffer *before = machine.memory.nearest(p), *after = machine.memory.next(p);
    const Buffer* buffer =
        before == nullptr || (after != nullptr && after->begin - p < p - (before->begin + before->bytes)) ? after
                                                                                                          : before;
    if (buffer != nullptr) return relative(buffer->name, buffer->begin, buffer->bytes);
  }
  if (machine.running != nullptr && machine.running->near_dynamic(p))
    return relative("the dynamic shared memory", machine.running->dynamic(), machine.running_grid->config.shared);
  if (machine.static_shared <= p && p < machine.static_shared + machine.static_bytes) return "static shared memory";
  if (machine.stacks.contains(p)) return "the stack: more than 128 KB of local variables";
  std::ostringstream text;
  text << "the address " << pointer << ", which is no memory of the device";
  return text.str();
}

// Runs the oldest launches until at most so many wait.
void run_pending(size_t waiting) {
  while (machine.pending.size() > waiting && machine.error.empty()) {
    Launch first = std::move(machine.pending.front());
    machine.pending.pop_front();
    machine.tickets.clear();
    ++machine.launch_serial;
    run_grid(*first.grid, std::move(first.early), first.early_index);
  }
}

int launch(const LaunchConfig& config, const void* kernel, std::function<void()> body) {
  const dim3 &grid = config.grid, &block = config.block;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return kInvalidConfiguration;
  const auto limit = machine.shared_limit.find({kernel, machine.major});
  if (config.shared > (limit == machine.shared_limit.end() ? kDefaultShared : limit->second)) return kInvalidValue;
  Launch next{std::make_unique<Grid>(Grid{config, kernel, std::move(body)}), nullptr};
  const auto carveout = machine.carveout.find({kernel, machine.major});
  const int wanted = carveout == machine.carveout.end() ? -1 : carveout->second;
  if (config.dependent && wanted != machine.last_carveout) {
    set_error("kernel " + mark("fn", kernel) +
                  ": launched as dependent with another split of shared memory and L1 than the kernel before, which "
                  "keeps them apart",
              nullptr);
    return kLaunchFailure;
  }
  machine.last_carveout = wanted;
  if (!config.dependent) run_pending(0);
  if (!machine.pending.empty() && machine.error.empty()) {
    next.early_index = machine.draw(static_cast<size_t>(grid.x) * grid.y * grid.z);
    next.early = std::make_unique<Block>(*next.grid, unflatten(next.early_index, grid), true);
    next.early->run();
  }
  machine.pending.push_back(std::move(next));
  run_pending(1 + machine.draw(kMostPending));
  return machine.error.empty() ? 0 : kLaunchFailure;
}

int synchronize() {
  run_pending(0);
  return machine.error.empty() ? 0 : kLaunchFailure;
}

int set_shared_limit(const void* kernel, int bytes) {
  const int most = machine.major >= 9 ? 227 * 1024 : 163 * 1024;
  if (bytes < 0 || bytes > most) return kInvalidValue;
  ++machine.attributes_set;
  machine.shared_limit[{kernel, machine.major}] = std::max(static_cast<size_t>(bytes), kDefaultShared);
  return 0;
}

int set_carveout(const void* kernel, int percent) {
  ++machine.attributes_set;
  machine.carveout[{kernel, machine.major}] = percent;
  return percent < -1 || percent > 100 ? kInvalidValue : 0;
}

int compute_major() { return machine.major; }

int memset_async(void* pointer, int value, size_t bytes) {
  if (const int status = synchronize()) return status;
  std::string text;
  if (bytes > 0 && check_global(static_cast<char*>(pointer), bytes, Access::write, &text) != nullptr) {
    set_error("cudaMemsetAsync touches " + text, nullptr);
    return kInvalidValue;
  }
  std::memset(pointer, value, bytes);
  return 0;
}

int memcpy_async(void* to, const void* from, size_t bytes) {
  if (const int status = synchronize()) return status;
  std::string text;
  if (bytes > 0 && (check_global(static_cast<char*>(to), bytes, Access::write, &text) != nullptr ||
                    check_global(static_cast<const char*>(from), bytes, Access::read, &text) != nullptr)) {
    set_error("cudaMemcpyAsync touches " + text, nullptr);
    return kInvalidValue;
  }
  std::memcpy(to, from, bytes);
  return 0;
}

void collective(unsigned mask, const char* what, Complete complete, void* request, unsigned line) {
  machine.running->collective(mask, what, complete, request, line);
}

void ticket(const void* counter) { machine.running->ticket(counter); }

void warp_barrier(unsigned mask) {
  const Complete join = [](void* const*, unsigned) {
    machine.running->clocks().join(1u << machine.running->current() / kWarp);
  };
  machine.running->collective(mask, "__syncwarp", join, nullptr);
}

void block_barrier(int id, int threads, unsigned line) {
  if (id < 0 || id > 15 || (id > 0 && (threads <= 0 || threads % 32 != 0)))
    fail("barrier %d of %d threads", id, threads);
  machine.running->barrier(id, threads, line);
}

int block_vote(int value, int what, unsigned line) { return machine.running->vote(value, what, line); }
unsigned lane() { return machine.running->current() % kWarp; }
unsigned active_mask() { return machine.running->active(machine.running->current() / kWarp); }
bool is_shared(const void* pointer) { return machine.running->in_shared(pointer); }
bool is_global(const void* pointer) { return machine.memory.contains(pointer); }
void* dynamic_shared() { return machine.running->dynamic(); }
void cp_async_commit() { machine.running->cp_async_commit(); }
void cp_async_wait(int newest) { machine.running->cp_async_wait(newest); }
void dependency_wait() { machine.running->wait_for_grid(); }
void dependents_trigger() {}

void cp_async(void* shared, const void* global, int bytes, int valid) {
  if (!is_global(global) && valid > 0) fail("cp.async from %s", describe_address(global).c_str());
  if (valid > 0) access(global, static_cast<size_t>(valid), Access::read, __builtin_return_address(0));
  machine.running->cp_async(static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid);
}

void access(const void* pointer, size_t bytes, Access kind, const void* where) {
  if (machine.running == nullptr) return;
  const auto* p = static_cast<const char*>(pointer);
  if (!machine.memory.contains(p)) return machine.running->touch(p, bytes, kind, where);
  if (kind == Access::atomic) machine.running->give_way();
  std::string text;
  const char* problem = check_global(p, bytes, kind, &text);
  if (problem != nullptr) machine.error_at = where, fail("%s%s", problem, text.c_str());
}

}  // namespace emu

#include "cuda_emulation/runtime/hooks.h"
#include "cuda_emulation/runtime/python.h"
