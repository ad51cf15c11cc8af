// Drives csrc/cpu/team.h for test_team.py: prints nothing and exits with 0 where every step saw all of the step before.
#include "cpu/team.h"

#include <cstdio>
#include <cstdlib>
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

}  // namespace

int main() {
  int wrong = 0;
  for (int threads : {1, 2, 3, 5})
    for (int stalled = 0; stalled < threads; ++stalled) wrong += steps(threads, 200, stalled);
  for (int round = 0; round < 200; ++round) wrong += steps(2, 3, 0);  // teams that come and go
  if (wrong) std::printf("%d numbers of an earlier step\n", wrong);
  for (bool first : {true, false}) {
    const double used = waiting(2, first, 0.5);
    if (used > 0.1) std::printf("waiting half a second took %.3f s of processor time\n", used), ++wrong;
  }
  return wrong != 0;
}
