// Checks that helper threads keep the processors that they may run on, whatever the system answers.
//
// affinity granted|refused|shrunk: the system grants every change, refuses every one, or refuses to restore a mask as
// it was. Prints the number of changes asked for; fails where a helper works with fewer processors than it had.

#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include "../threads.h"

namespace {

constexpr int kCalls = 20;

std::string answer;
std::atomic<int> asked{0};

}  // namespace

// In place of libc's: every thread seems to be on processor 0, where its caller is.
extern "C" int sched_getcpu() noexcept { return 0; }

extern "C" int sched_setaffinity(pid_t thread, size_t size, const cpu_set_t* mask) noexcept {
  const int number = asked.fetch_add(1);
  if (answer == "refused" || (answer == "shrunk" && number % 3 == 1)) {
    errno = answer == "refused" ? EPERM : EINVAL;
    return -1;
  }
  return static_cast<int>(syscall(SYS_sched_setaffinity, thread, size, mask));
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  answer = argv[1];
  cpu_set_t all;
  sched_getaffinity(0, sizeof all, &all);
  std::atomic<int> helped{0}, narrowed{0};
  for (int call = 1; call <= kCalls; ++call)
    fastcascade::run_on_helpers(2, [&](int rank, int helpers) {
      if (rank > 0) {
        cpu_set_t own;
        sched_getaffinity(0, sizeof own, &own);
        narrowed += !CPU_EQUAL(&own, &all);
        ++helped;
        return;
      }
      while (helpers > 0 && helped.load() < call) std::this_thread::sleep_for(std::chrono::microseconds(100));
    });
  std::printf("%d asked, %d helped, %d narrowed\n", asked.load(), helped.load(), narrowed.load());
  return narrowed.load() > 0;
}
