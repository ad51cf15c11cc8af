// A team of threads that lives through one op: OpenMP starts it, a barrier joins its steps.
#pragma once

#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace lsk {

// Steps are microseconds apart, so a member that waits spins. Where it waits for long, another process has the core of
// the one it waits for. Then it sleeps: the operating system moves that one onto the core that became free. It does not
// yield, which would hand over its own core for as long as that process likes, in the middle of every step.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const uint32_t phase = state_.load(std::memory_order_acquire) & ~kSleepers;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      if (state_.exchange(phase + kPhase, std::memory_order_acq_rel) & kSleepers) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
      return;
    }
    if (!spin(phase)) sleep(phase);
  }

 private:
  static constexpr uint32_t kSleepers = 1, kPhase = 2;  // of the state: somebody sleeps; one phase more
  static constexpr std::chrono::microseconds kPatience{100};

  bool passed(uint32_t phase) const { return (state_.load(std::memory_order_acquire) & ~kSleepers) != phase; }

  // Whether the phase passed in time.
  bool spin(uint32_t phase) const {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    do {
      for (int i = 0; i < 64; ++i) {
        if (passed(phase)) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  void sleep(uint32_t phase) {
    while (!passed(phase)) {
      uint32_t awake = phase;
      state_.compare_exchange_strong(awake, phase | kSleepers, std::memory_order_acq_rel);
      futex(FUTEX_WAIT_PRIVATE, phase | kSleepers);  // returns at once where the state is another by now
    }
  }

  void futex(int operation, uint32_t value) {
    static_assert(sizeof(state_) == sizeof(uint32_t), "the kernel looks at the number itself");
    syscall(SYS_futex, &state_, operation, value, nullptr, nullptr, 0);
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> state_{0};
};

struct Range {
  int64_t begin, end;
};

struct Member {
  int index, size;
  Barrier* barrier;

  void wait() const { barrier->wait(size); }

  // This member's contiguous share of [0, total), in multiples of `unit`.
  Range share(int64_t total, int64_t unit = 1) const {
    const int64_t units = (total + unit - 1) / unit;
    const int64_t begin = units * index / size * unit, end = units * (index + 1) / size * unit;
    return {begin < total ? begin : total, end < total ? end : total};
  }
};

// Runs f(member) on up to `threads` threads. Kernels do not throw.
template <class F>
void run_team(int threads, F f) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const Member member{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    f(member);
    member.wait();  // OpenMP's own barrier at the end spins for milliseconds
  }
}

}  // namespace lsk
