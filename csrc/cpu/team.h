// A team of threads that lives through one op: OpenMP starts it, a barrier joins its steps.
#pragma once

#include <omp.h>

// Linux's own call: std::atomic yields before it waits, which is what must not happen (see Barrier).
#if defined(__linux__) && !defined(LSK_PORTABLE_WAIT)
#define LSK_FUTEX
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>

namespace lsk {

#if defined(LSK_TEAM_CLOCK)  // tests play the time
using Clock = LSK_TEAM_CLOCK;
#else
using Clock = std::chrono::steady_clock;
#endif
using Microseconds = std::chrono::microseconds;

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
      if (state_.exchange(phase + kPhase, std::memory_order_acq_rel) & kSleepers) wake_all();
      return;
    }
    if (spin(phase)) return;
    const auto start = Clock::now();
    sleep(phase);
    slept_ += std::chrono::duration_cast<Microseconds>(Clock::now() - start).count();
  }

  // How long members have slept, added up.
  Microseconds slept() const { return Microseconds(slept_.load()); }

 private:
  static constexpr uint32_t kSleepers = 1, kPhase = 2;  // of the state: somebody sleeps; one phase more
  static constexpr Microseconds kPatience{100};

  bool passed(uint32_t phase) const { return (state_.load(std::memory_order_acquire) & ~kSleepers) != phase; }

  // Whether the phase passed in time.
  bool spin(uint32_t phase) const {
    const auto end = Clock::now() + kPatience;
    do {
      for (int i = 0; i < 64; ++i) {
        if (passed(phase)) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    } while (Clock::now() < end);
    return false;
  }

  void sleep(uint32_t phase) {
    while (!passed(phase)) {
      uint32_t awake = phase;
      state_.compare_exchange_strong(awake, phase | kSleepers, std::memory_order_acq_rel);
      sleep_while(phase | kSleepers);  // returns at once where the state is another by now
    }
  }

#if defined(LSK_FUTEX)
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the operating system looks at the number itself");

  void sleep_while(uint32_t state) { syscall(SYS_futex, &state_, FUTEX_WAIT_PRIVATE, state, nullptr, nullptr, 0); }
  void wake_all() { syscall(SYS_futex, &state_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep_while(uint32_t state) { state_.wait(state, std::memory_order_acquire); }
  void wake_all() { state_.notify_all(); }
#endif

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> state_{0};
  std::atomic<int64_t> slept_{0};
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

// How many threads a team gets. All that are asked for, as long as they run side by side. Where other processes have
// some of the cores, each step takes as long as the member that was interrupted, and fewer threads are faster; so a
// team that slept for a third of its time is followed by smaller ones for a while, then all are tried again. No result
// depends on it.
class Crowd {
 public:
  static Crowd& here() {
    static Crowd crowd;
    return crowd;
  }

  int members(int threads) const {
    if (fixed_ || Clock::now().time_since_epoch().count() >= until_) return threads;
    return threads < most_ ? threads : most_.load();
  }

  void judge(int asked, int members, Microseconds slept, Clock::duration elapsed) {
    if (members == 1 || fixed_ || elapsed < Microseconds(500)) return;  // too short to tell
    const bool crowded = 3 * slept > (members - 1) * elapsed;
    if (crowded) {
      most_ = members - 1 - members / 8;
      until_ = (Clock::now() + Microseconds(pause_)).time_since_epoch().count();
    } else if (members < asked) {
      return;  // which says nothing of the cores that are left out
    }
    const int64_t pause = crowded ? pause_ * 2 : pause_ / 2;
    pause_ = pause < kShortest ? kShortest : pause > kLongest ? kLongest : pause;
  }

 private:
  static constexpr int64_t kShortest = 10000, kLongest = 1000000;  // microseconds
  const bool fixed_ = std::getenv("LAYERSKIP_FIXED_TEAM") != nullptr;
  std::atomic<int> most_{1};
  std::atomic<int64_t> until_{0}, pause_{kShortest};
};

// Runs f(member) on up to `threads` threads. Kernels do not throw.
template <class F>
void run_team(int threads, F f) {
  const auto start = Clock::now();
  const int wanted = threads > 1 ? Crowd::here().members(threads) : 1;
  int members = 1;
  Barrier barrier;
#pragma omp parallel num_threads(wanted)
  {
    const Member member{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    if (member.index == 0) members = member.size;
    f(member);
    member.wait();  // OpenMP's own barrier at the end spins for milliseconds
  }
  Crowd::here().judge(threads, members, barrier.slept(), Clock::now() - start);
}

}  // namespace lsk
