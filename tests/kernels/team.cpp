// Drives csrc/cpu/team.h for test_team.py: prints what is wrong and exits with 1, or nothing and exits with 0.
//   team waits   members wait for each other; wants LAYERSKIP_FIXED_TEAM
//   team sleeps  who waits for long sleeps, who waits for a moment does not; wants LAYERSKIP_FIXED_TEAM
//   team shrinks a team that slept is followed by a smaller one, for a while, and one that did not by one of its size
#include "cpu/team.h"

#include <sys/resource.h>

#include <cstdio>
#include <cstring>
#include <ctime>
#include <vector>

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

void work(int microseconds) {
  const auto end = lsk::Clock::now() + lsk::Microseconds(microseconds);
  while (lsk::Clock::now() < end) {
  }
}

// Whether members that wait for a moment sleep. Where another process has a core, a moment is long; those tries tell
// nothing.
bool naps() {
  int moments = 0, slept = 0;
  const auto end = lsk::Clock::now() + std::chrono::seconds(2);
  while (moments < 1000 && lsk::Clock::now() < end) {
    lsk::Barrier barrier;
    lsk::Clock::time_point came[2];
    lsk::run_team(2, [&](const lsk::Member& member) {
      if (member.index == 1) work(20);
      came[member.index] = lsk::Clock::now();
      barrier.wait(member.size);
    });
    if (came[1] <= came[0] || came[1] - came[0] > lsk::Microseconds(50)) continue;
    ++moments;
    slept += barrier.slept().count() > 0;
  }
  return 2 * slept > moments;
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
  if (naps()) std::printf("whoever waits 20 microseconds sleeps\n"), ++wrong;
  return wrong;
}

int size_of(int threads) {
  int size = 0;
  lsk::run_team(threads, [&](const lsk::Member& member) {
    if (member.index == 0) size = member.size;
  });
  return size;
}

int shrinks() {
  int wrong = 0;
  for (int threads : {2, 4, 9}) {
    const int fewer = threads - 1 - threads / 8;
    bool shrank = false;  // in one of some tries: this process may itself be stopped for longer than a team is smaller
    for (int round = 0; round < 20 && !shrank; ++round) {
      waiting(threads, round % 2, 0.02);
      shrank = size_of(threads) == fewer && size_of(1) == 1;
      usleep(1200000);  // the longest that a team stays smaller
      if (size_of(threads) != threads) std::printf("%d threads did not come back\n", threads), ++wrong;
    }
    if (!shrank) std::printf("%d threads were not followed by %d\n", threads, fewer), ++wrong;
  }
  for (int round = 0; round < 10; ++round) {
    usleep(1200000);
    const auto start = lsk::Clock::now();
    lsk::run_team(2, [](const lsk::Member&) { work(1000); });
    if (lsk::Clock::now() - start > lsk::Microseconds(1300)) continue;  // others had a core
    if (size_of(2) == 2) break;
    std::printf("a team that did not sleep was followed by a smaller one\n"), ++wrong;
    break;
  }
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const char* what = arguments[1];
  if (std::strcmp(what, "waits") == 0) return waits() != 0;
  if (std::strcmp(what, "sleeps") == 0) return sleeps() != 0;
  return shrinks() != 0;
}
