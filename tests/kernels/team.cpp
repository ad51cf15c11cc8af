// Drives csrc/cpu/team.h for test_team.py: prints what is wrong and exits with 1, or nothing and exits with 0.
//   team waits   members wait for each other; wants LAYERSKIP_FIXED_TEAM
//   team sleeps  who waits for long leaves its core to others; wants LAYERSKIP_FIXED_TEAM
//   team plays   when a member that waits goes to sleep, in a time that is played, however busy the machine is
//   team shrinks a team that slept is followed by a smaller one, for a while, and one that did not by one of its size
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

// The time of a team: that of the machine, so many times slower, and set forward by hand; or what `play` says.
struct TestClock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<TestClock>;
  static constexpr bool is_steady = true;

  static inline int64_t slowness = 1;
  static inline duration forward{0};
  static inline std::function<duration()> play;

  static time_point now() {
    if (play) return time_point(play());
    return time_point(std::chrono::steady_clock::now().time_since_epoch() / slowness + forward);
  }
};

// What a member that waits asks of the operating system; `asked` has it where the time is played.
inline std::function<void(bool sleeps)> asked;

#if defined(__linux__)
template <class... Args>
long team_syscall(long number, std::atomic<uint32_t>* state, int operation, Args... args) {
  if (!asked) return ::syscall(number, state, operation, args...);
  asked(operation == FUTEX_WAIT_PRIVATE);
  return 0;
}
#endif

}  // namespace lsk

#define LSK_TEAM_CLOCK TestClock
#define syscall team_syscall
#include "cpu/team.h"
#undef syscall

namespace {

// Members add to one another's counters in turn; whoever runs ahead of a wait reads an old number.
int steps(int threads, int count, int stalled) {
  std::vector<int> seen(threads, 0);
  std::atomic<int> wrong{0};
  lsk::run_team(threads, [&](const lsk::Member& member) {
    if (member.size != threads) ++wrong;
    for (int step = 0; step < count; ++step) {
      if (member.index == stalled % threads && step % 16 == 7) usleep(2000);  // as if its core were taken
      seen[member.index] = step + 1;
      member.wait();
      for (int other = 0; other < threads; ++other) wrong += seen[other] != step + 1;
      member.wait();
    }
  });
  for (int own : seen) wrong += own != count;
  return wrong;
}

// Processor seconds that a team uses while its first member, or its last, does nothing for `seconds`.
double waiting(int threads, bool first, double seconds) {
  const auto used = [] {
    timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
  };
  const double before = used();
  lsk::run_team(threads, [&](const lsk::Member& member) {
    if (member.index == (first ? 0 : member.size - 1)) usleep(seconds * 1e6);
  });
  return used() - before;
}

int waits() {
  int wrong = 0;
  for (int threads : {1, 2, 3, 5})
    for (int stalled = 0; stalled < threads; ++stalled) wrong += steps(threads, 200, stalled);
  for (int round = 0; round < 200; ++round) wrong += steps(2, 3, 0);  // teams that come and go
  if (wrong) std::printf("%d numbers of an earlier step\n", wrong);
  return wrong;
}

// How often the second of two members gave up its core, because it waited for the first, which does nothing for 50 ms.
// Unlike processor time, this tells spinning from sleeping on a busy machine, too.
long switches() {
  long count = 1;
#if defined(RUSAGE_THREAD)
  const auto so_far = [] {
    rusage now;
    getrusage(RUSAGE_THREAD, &now);
    return now.ru_nvcsw;
  };
  lsk::run_team(2, [&](const lsk::Member& member) {
    if (member.index == 0) usleep(50000);
    const long before = so_far();
    member.wait();
    if (member.index == 1) count = so_far() - before;
  });
#endif
  return count;
}

int sleeps() {
  int wrong = 0;
  long count = 0;  // of the first try in which it had a core to give up; there is none for who spins
  for (int round = 0; round < 40 && count == 0; ++round) count = switches();
  if (count < 1 || count > 10) std::printf("waiting 50 ms gave up the core %ld times\n", count), ++wrong;
  for (bool first : {true, false}) {
    const double used = waiting(2, first, 0.5);
    if (used > 0.1) std::printf("waiting half a second took %.3f s of processor time\n", used), ++wrong;
  }
  return wrong;
}

// A member of two waits; the other one, `arrives` microseconds later, is played by the clock, which goes on by ten
// whenever it is looked at. Where nothing arrives in time, the first must ask to sleep, and the other then comes.
struct Play {
  static constexpr int64_t kNever = 1 << 30, kTooLate = 10000;

  lsk::Barrier barrier;
  int64_t time = 0, arrives, slept_at = -1;
  int sleeps = 0, wakes = 0;
  std::atomic<bool> arrived{false};
  std::thread other;

  explicit Play(int64_t after) : arrives(after) {}

  void arrive() {
    if (!arrived.exchange(true)) barrier.wait(2);
  }

  void run() {
    lsk::TestClock::play = [this] {
      time += 10;
      if (time >= arrives || time >= kTooLate) arrive();
#if !defined(LSK_FUTEX)
      // std::atomic's own sleep cannot be watched: a thread arrives, mostly when it has begun.
      if (time == 100 && !arrived) other = std::thread([this] { usleep(20000), arrive(); });
#endif
      return lsk::Microseconds(time);
    };
    lsk::asked = [this](bool sleep) {
      if (!sleep) return void(++wakes);
      ++sleeps;
      if (slept_at < 0) slept_at = time;
      arrive();
    };
    barrier.wait(2);
    if (other.joinable()) other.join();
    lsk::TestClock::play = nullptr, lsk::asked = nullptr;
  }
};

int plays() {
  int wrong = 0;
  alarm(20);  // a member that neither sleeps nor goes on is ended, which is a failure, too
  for (int64_t moment : {10, 50, 90}) {
    Play play(moment);
    play.run();
    if (play.barrier.slept().count() == 0 && play.sleeps + play.wakes == 0) continue;
    std::printf("whoever waits %d microseconds sleeps\n", static_cast<int>(moment)), ++wrong;
  }
  Play play(Play::kNever);
  play.run();
  if (play.barrier.slept().count() == 0) std::printf("whoever waits for long does not sleep\n"), ++wrong;
#if defined(LSK_FUTEX)
  const int64_t at = play.slept_at;
  if (at < 100 || at > 200) std::printf("slept after %d microseconds\n", static_cast<int>(at)), ++wrong;
  if (play.sleeps != 1) std::printf("asked for sleep %d times\n", play.sleeps), ++wrong;
  if (play.wakes != 1) std::printf("who slept was woken %d times\n", play.wakes), ++wrong;
#endif
  return wrong;
}

int size_of(int threads) {
  int size = 0;
  lsk::run_team(threads, [&](const lsk::Member& member) {
    if (member.index == 0) size = member.size;
  });
  return size;
}

// What is judged of teams of four in a time that stands still but for `forward`.
int judges() {
  int wrong = 0;
  int64_t time = 0;
  const auto expect = [&](int size, const char* after) {
    const int found = lsk::Crowd::here().members(4);
    if (found != size) std::printf("%d members after %s, not %d\n", found, after, size), ++wrong;
  };
  const auto judge = [&](int asked, int members, int slept, int elapsed) {
    lsk::Crowd::here().judge(asked, members, lsk::Microseconds(slept), lsk::Microseconds(elapsed));
  };
  lsk::TestClock::play = [&] { return lsk::Microseconds(time); };
  judge(4, 4, 0, 10000), expect(4, "a team that did not sleep");
  judge(4, 4, 9000, 10000), expect(4, "one that slept for less than a third");
  judge(4, 4, 400, 400), expect(4, "one that was too short to tell");
  judge(4, 4, 11000, 10000), expect(3, "one that slept for more than a third");
  time += 9000, expect(3, "9 ms");
  judge(4, 3, 0, 10000), expect(3, "a smaller one that did not sleep");
  time += 2000, expect(4, "11 ms");
  judge(4, 4, 20000, 10000), time += 19000, expect(3, "19 ms of a second time");
  time += 2000, expect(4, "21 ms of a second time");
  lsk::TestClock::play = nullptr;
  return wrong;
}

// The same by teams that run, in slow motion, so that what takes a busy machine long is short.
int shrinks() {
  int wrong = judges();
  lsk::TestClock::slowness = 100;
  for (int threads : {2, 4, 9}) {
    const int fewer = threads - 1 - threads / 8;
    bool shrank = false;  // in one of some tries: this process may itself be stopped for longer than a team is smaller
    for (int round = 0; round < 5 && !shrank; ++round) {
      lsk::TestClock::forward += std::chrono::seconds(2);  // the longest that a team stays smaller
      const int before = size_of(threads);
      if (before != threads) std::printf("%d threads did not come back\n", threads), ++wrong;
      waiting(threads, round % 2, 0.5);
      shrank = size_of(threads) == fewer && size_of(1) == 1;
    }
    if (!shrank) std::printf("%d threads were not followed by %d\n", threads, fewer), ++wrong;
  }
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const char* what = arguments[1];
  if (std::strcmp(what, "waits") == 0) return waits() != 0;
  if (std::strcmp(what, "sleeps") == 0) return sleeps() != 0;
  if (std::strcmp(what, "plays") == 0) return plays() != 0;
  return shrinks() != 0;
}
