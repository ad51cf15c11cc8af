// A team of threads that lives through one op: OpenMP starts it, a spinning barrier joins its steps.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace lsk {

class SpinBarrier {
 public:
  void resize(int members) { members_ = members; }

  void wait() {
    if (members_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    // Steps are microseconds apart; a thread without a core of its own must give way to the ones it waits for.
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
      if (++spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 1000;
  int members_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Range {
  int64_t begin, end;
};

struct Member {
  int index, size;
  SpinBarrier* barrier;

  void wait() const { barrier->wait(); }

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
  SpinBarrier barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier.resize(omp_get_num_threads());
    f(Member{omp_get_thread_num(), omp_get_num_threads(), &barrier});
  }
}

}  // namespace lsk
