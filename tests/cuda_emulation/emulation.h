// What the stand-in's headers ask of its runtime (runtime/*.h, one translation unit compiled without instrumentation).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emu {

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct LaunchConfig {
  dim3 grid, block;
  size_t shared = 0;
  bool dependent = false;
};

// Puts a launch behind the one before it. 0, or a cudaError_t.
int launch(const LaunchConfig& config, const void* kernel, std::function<void()> body);
int set_shared_limit(const void* kernel, int bytes);
int set_carveout(const void* kernel, int percent);  // of an SM's memory, for shared memory
int memset_async(void* pointer, int value, size_t bytes);
int memcpy_async(void* to, const void* from, size_t bytes);
int synchronize();
int compute_major();

// From here on: called by device code.

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// A collective of the lanes in `mask`: when the last of them is there, it runs complete(requests, mask), where
// requests[l] is what lane l passed, null if it has exited.
using Complete = void (*)(void* const* requests, unsigned mask);
// `line`, unless 0, is that of the kernel's source: all lanes must come from the same one.
void collective(unsigned mask, const char* what, Complete complete, void* request, unsigned line = 0);
void warp_barrier(unsigned mask);
void block_barrier(int id, int threads, unsigned line = 0);  // id 0: all threads of the block
int block_vote(int value, int what, unsigned line);          // 0 count, 1 and, 2 or
unsigned lane();
unsigned active_mask();  // lanes of the warp that have not exited

enum class Access : uint8_t { read, write, atomic };
void access(const void* pointer, size_t bytes, Access kind, const void* where);
void ticket(const void* counter);  // taken just now: acquire and release at device scope
bool is_shared(const void* pointer);
bool is_global(const void* pointer);

void* dynamic_shared();
void cp_async(void* shared, const void* global, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int newest);
void dependency_wait();
void dependents_trigger();

}  // namespace emu

// Of the running thread; set at every switch of fibers.
extern emu::uint3 threadIdx, blockIdx;
extern emu::dim3 blockDim, gridDim;
