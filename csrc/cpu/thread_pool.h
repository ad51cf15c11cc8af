// Worker threads for one op: OpenMP starts them, a barrier separates the steps.
#pragma once

#include <omp.h>

// Use the futex directly: std::atomic::wait yields before it sleeps, which Barrier must avoid.
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

#if defined(LSK_TEST_CLOCK)  // tests simulate time
using Clock = LSK_TEST_CLOCK;
#else
using Clock = std::chrono::steady_clock;
#endif
using Microseconds = std::chrono::microseconds;

// Steps are microseconds apart, so a waiting worker spins. A long wait means that another process occupies the core of
// the worker being waited for. The waiting worker then sleeps, so that the operating system can move that worker to the
// free core. It does not yield: that would give up its own core for a whole time slice in the middle of every step.
class Barrier {
 public:
  void wait(int num_workers) {
    if (num_workers == 1) return;
    const uint32_t phase = state_.load(std::memory_order_acquire) & ~kSleepers;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_workers) {
      arrived_.store(0, std::memory_order_relaxed);
      if (state_.exchange(phase + kPhase, std::memory_order_acq_rel) & kSleepers) wake_all();
      return;
    }
    if (spin(phase)) return;
    const auto start = Clock::now();
    sleep(phase);
    slept_ += std::chrono::duration_cast<Microseconds>(Clock::now() - start).count();
  }

  // Total sleeping time of all workers.
  Microseconds slept() const { return Microseconds(slept_.load()); }

 private:
  static constexpr uint32_t kSleepers = 1, kPhase = 2;  // bits of the state: a worker sleeps; increment of the phase
  static constexpr Microseconds kSpinLimit{100};

  bool passed(uint32_t phase) const { return (state_.load(std::memory_order_acquire) & ~kSleepers) != phase; }

  // True if the phase passed before the time limit.
  bool spin(uint32_t phase) const {
    const auto end = Clock::now() + kSpinLimit;
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
      sleep_while(phase | kSleepers);  // returns at once if the state has changed
    }
  }

#if defined(LSK_FUTEX)
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "futex needs a plain 32-bit word");

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

struct Worker {
  int index, num_workers;
  Barrier* barrier;

  void wait() const { barrier->wait(num_workers); }

  // This worker's contiguous share of [0, total), in multiples of `unit`.
  Range share(int64_t total, int64_t unit = 1) const {
    const int64_t units = (total + unit - 1) / unit;
    const int64_t each = units / num_workers, rest = units % num_workers;
    const auto at = [&](int i) { return (each * i + rest * i / num_workers) * unit; };  // units * i might overflow
    const int64_t begin = at(index), end = at(index + 1);
    return {begin < total ? begin : total, end < total ? end : total};
  }
};

// Chooses the number of workers. When other processes occupy some cores, each step takes as long as the interrupted
// worker, and fewer threads are faster. So after workers have slept for a third of their time, later calls get fewer
// for a while; then all requested threads are tried again. Results do not depend on the number.
class OversubscriptionMonitor {
 public:
  static OversubscriptionMonitor& instance() {
    static OversubscriptionMonitor monitor;
    return monitor;
  }

  int num_workers(int requested) const {
    if (disabled_ || Clock::now().time_since_epoch().count() >= until_) return requested;
    return requested < limit_ ? requested : limit_.load();
  }

  void record(int requested, int num_workers, Microseconds slept, Clock::duration elapsed) {
    if (num_workers == 1 || disabled_ || elapsed < Microseconds(500)) return;  // too short to measure
    const bool oversubscribed = 3 * slept > (num_workers - 1) * elapsed;
    if (oversubscribed) {
      limit_ = num_workers - 1 - num_workers / 8;
      until_ = (Clock::now() + Microseconds(pause_)).time_since_epoch().count();
    } else if (num_workers < requested) {
      return;  // says nothing about the cores that were not used
    }
    const int64_t pause = oversubscribed ? pause_ * 2 : pause_ / 2;
    pause_ = pause < kMinPause ? kMinPause : pause > kMaxPause ? kMaxPause : pause;
  }

 private:
  static constexpr int64_t kMinPause = 10000, kMaxPause = 1000000;  // microseconds
  // LAYERSKIP_FIXED_TEAM is the former name of the variable.
  const bool disabled_ = std::getenv("LAYERSKIP_FIXED_THREADS") || std::getenv("LAYERSKIP_FIXED_TEAM");
  std::atomic<int> limit_{1};
  std::atomic<int64_t> until_{0}, pause_{kMinPause};
};

// Runs f(worker) on up to `threads` threads. Kernels do not throw.
template <class F>
void parallel_run(int threads, F f) {
  const auto start = Clock::now();
  const int wanted = threads > 1 ? OversubscriptionMonitor::instance().num_workers(threads) : 1;
  int num_workers = 1;
  Barrier barrier;
#pragma omp parallel num_threads(wanted)
  {
    const Worker worker{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    if (worker.index == 0) num_workers = worker.num_workers;
    f(worker);
    worker.wait();  // OpenMP's own barrier at the end spins for milliseconds
  }
  OversubscriptionMonitor::instance().record(threads, num_workers, barrier.slept(), Clock::now() - start);
}

}  // namespace lsk
