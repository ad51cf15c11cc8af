// Drives csrc/cpu/thread_pool.h for test_thread_pool.py: prints failures and exits with 1, or exits with 0.
//   thread_pool barrier   workers wait for each other; needs LAYERSKIP_FIXED_THREADS
//   thread_pool sleep     a long wait gives up the core; needs LAYERSKIP_FIXED_THREADS
//   thread_pool simulate  when a waiting worker goes to sleep, in simulated time, independent of the machine's load
//   thread_pool shrink    after workers slept, later calls get fewer threads for a while; otherwise all of them
#include <sys/resource.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <thread>
#include <vector>

namespace lsk {

// The machine's time, `slowness` times slower and shifted by `offset`; or the result of `simulated`.
struct TestClock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<TestClock>;
  static constexpr bool is_steady = true;

  static inline int64_t slowness = 1;
  static inline duration offset{0};
  static inline std::function<duration()> simulated;

  static time_point now() {
    if (simulated) return time_point(simulated());
    return time_point(std::chrono::steady_clock::now().time_since_epoch() / slowness + offset);
  }
};

// Receives the futex calls of a waiting worker while time is simulated.
inline std::function<void(bool sleeps)> on_futex;

#if defined(__linux__)
template <class... Args>
long test_syscall(long number, std::atomic<uint32_t>* state, int operation, Args... args) {
  if (!on_futex) return ::syscall(number, state, operation, args...);
  on_futex(operation == FUTEX_WAIT_PRIVATE);
  return 0;
}
#endif

}  // namespace lsk

#define LSK_TEST_CLOCK TestClock
#define syscall test_syscall
#include "cpu/thread_pool.h"
#undef syscall

namespace {

// Workers read one another's counters between two waits; a worker that runs ahead reads an old number.
int steps(int threads, int count, int stalled) {
  std::vector<int> seen(threads, 0);
  std::atomic<int> wrong{0};
  lsk::parallel_run(threads, [&](const lsk::Worker& worker) {
    if (worker.num_workers != threads) ++wrong;
    for (int step = 0; step < count; ++step) {
      if (worker.index == stalled % threads && step % 16 == 7) usleep(2000);  // as if another process took its core
      seen[worker.index] = step + 1;
      worker.wait();
      for (int other = 0; other < threads; ++other) wrong += seen[other] != step + 1;
      worker.wait();
    }
  });
  for (int own : seen) wrong += own != count;
  return wrong;
}

// Processor seconds used while the first or the last worker does nothing for `seconds`.
double waiting(int threads, bool first, double seconds) {
  const auto used = [] {
    timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
  };
  const double before = used();
  lsk::parallel_run(threads, [&](const lsk::Worker& worker) {
    if (worker.index == (first ? 0 : worker.num_workers - 1)) usleep(seconds * 1e6);
  });
  return used() - before;
}

int test_barrier() {
  int wrong = 0;
  for (int threads : {1, 2, 3, 5})
    for (int stalled = 0; stalled < threads; ++stalled) wrong += steps(threads, 200, stalled);
  for (int round = 0; round < 200; ++round) wrong += steps(2, 3, 0);  // many short calls
  if (wrong) std::printf("%d numbers of an earlier step\n", wrong);
  return wrong;
}

// Voluntary context switches of the second of two workers while it waits 50 ms for the first. Unlike processor time,
// this tells spinning from sleeping on a busy machine, too.
long switches() {
  long count = 1;
#if defined(RUSAGE_THREAD)
  const auto so_far = [] {
    rusage now;
    getrusage(RUSAGE_THREAD, &now);
    return now.ru_nvcsw;
  };
  lsk::parallel_run(2, [&](const lsk::Worker& worker) {
    if (worker.index == 0) usleep(50000);
    const long before = so_far();
    worker.wait();
    if (worker.index == 1) count = so_far() - before;
  });
#endif
  return count;
}

int test_sleep() {
  int wrong = 0;
  long count = 0;  // of the first try in which the worker had a core to give up; a spinning worker never does
  for (int round = 0; round < 40 && count == 0; ++round) count = switches();
  if (count < 1 || count > 10) std::printf("waiting 50 ms gave up the core %ld times\n", count), ++wrong;
  for (bool first : {true, false}) {
    const double used = waiting(2, first, 0.5);
    if (used > 0.1) std::printf("waiting half a second took %.3f s of processor time\n", used), ++wrong;
  }
  return wrong;
}

// One of two workers waits; the clock plays the other one, which arrives at `arrival` microseconds. Every look at the
// clock advances it by ten. If nothing arrives in time, the first worker must ask to sleep; then the other one arrives.
struct Simulation {
  static constexpr int64_t kNever = 1 << 30, kTooLate = 10000;

  lsk::Barrier barrier;
  int64_t time = 0, arrival, slept_at = -1;
  int sleeps = 0, wakes = 0;
  std::atomic<bool> arrived{false};
  std::thread other;

  explicit Simulation(int64_t after) : arrival(after) {}

  void arrive() {
    if (!arrived.exchange(true)) barrier.wait(2);
  }

  void run() {
    lsk::TestClock::simulated = [this] {
      time += 10;
      if (time >= arrival || time >= kTooLate) arrive();
#if !defined(LSK_FUTEX)
      // The sleep of std::atomic cannot be observed: a thread arrives, usually after it has begun.
      if (time == 100 && !arrived) other = std::thread([this] { usleep(20000), arrive(); });
#endif
      return lsk::Microseconds(time);
    };
    lsk::on_futex = [this](bool sleep) {
      if (!sleep) return void(++wakes);
      ++sleeps;
      if (slept_at < 0) slept_at = time;
      arrive();
    };
    barrier.wait(2);
    if (other.joinable()) other.join();
    lsk::TestClock::simulated = nullptr, lsk::on_futex = nullptr;
  }
};

int test_simulated() {
  int wrong = 0;
  alarm(20);  // ends a worker that neither sleeps nor returns, which fails the test
  for (int64_t moment : {10, 50, 90}) {
    Simulation simulation(moment);
    simulation.run();
    if (simulation.barrier.slept().count() == 0 && simulation.sleeps + simulation.wakes == 0) continue;
    std::printf("a wait of %d microseconds slept\n", static_cast<int>(moment)), ++wrong;
  }
  Simulation simulation(Simulation::kNever);
  simulation.run();
  if (simulation.barrier.slept().count() == 0) std::printf("a long wait did not sleep\n"), ++wrong;
#if defined(LSK_FUTEX)
  const int64_t at = simulation.slept_at;
  if (at < 100 || at > 200) std::printf("slept after %d microseconds\n", static_cast<int>(at)), ++wrong;
  if (simulation.sleeps != 1) std::printf("asked for sleep %d times\n", simulation.sleeps), ++wrong;
  if (simulation.wakes != 1) std::printf("woke the sleeper %d times\n", simulation.wakes), ++wrong;
#endif
  return wrong;
}

int num_workers(int threads) {
  int count = 0;
  lsk::parallel_run(threads, [&](const lsk::Worker& worker) {
    if (worker.index == 0) count = worker.num_workers;
  });
  return count;
}

// Decisions of the monitor for four threads, in simulated time.
int test_monitor() {
  int wrong = 0;
  int64_t time = 0;
  const auto expect = [&](int count, const char* after) {
    const int found = lsk::OversubscriptionMonitor::instance().num_workers(4);
    if (found != count) std::printf("%d workers after %s, not %d\n", found, after, count), ++wrong;
  };
  const auto record = [&](int requested, int count, int slept, int elapsed) {
    lsk::OversubscriptionMonitor::instance().record(requested, count, lsk::Microseconds(slept),
                                                    lsk::Microseconds(elapsed));
  };
  lsk::TestClock::simulated = [&] { return lsk::Microseconds(time); };
  record(4, 4, 0, 10000), expect(4, "a call without sleep");
  record(4, 4, 9000, 10000), expect(4, "less than a third asleep");
  record(4, 4, 400, 400), expect(4, "a call too short to measure");
  record(4, 4, 11000, 10000), expect(3, "more than a third asleep");
  time += 9000, expect(3, "9 ms");
  record(4, 3, 0, 10000), expect(3, "fewer workers without sleep");
  time += 2000, expect(4, "11 ms");
  record(4, 4, 20000, 10000), time += 19000, expect(3, "19 ms of a second time");
  time += 2000, expect(4, "21 ms of a second time");
  lsk::TestClock::simulated = nullptr;
  return wrong;
}

// The same with real threads in slow motion, so that delays caused by a busy machine are short.
int test_shrink() {
  int wrong = test_monitor();
  lsk::TestClock::slowness = 100;
  for (int threads : {2, 4, 9}) {
    const int fewer = threads - 1 - threads / 8;
    bool shrank = false;  // in one of five tries: this process may itself be stopped for longer than the pause
    for (int round = 0; round < 5 && !shrank; ++round) {
      lsk::TestClock::offset += std::chrono::seconds(2);  // the longest pause
      const int before = num_workers(threads);
      if (before != threads) std::printf("%d threads did not come back\n", threads), ++wrong;
      waiting(threads, round % 2, 0.5);
      shrank = num_workers(threads) == fewer && num_workers(1) == 1;
    }
    if (!shrank) std::printf("%d threads did not shrink to %d\n", threads, fewer), ++wrong;
  }
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const char* test = arguments[1];
  if (std::strcmp(test, "barrier") == 0) return test_barrier() != 0;
  if (std::strcmp(test, "sleep") == 0) return test_sleep() != 0;
  if (std::strcmp(test, "simulate") == 0) return test_simulated() != 0;
  return test_shrink() != 0;
}
