// Checks that a team runs every part of every phase once and in order, whoever comes late, and that nobody waits long
// for a thread that has lost its processor.
//
// phases THREADS: prints the number of calls; fails with a message at the first wrong one.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "../team.h"
#include "../threads.h"

namespace {

using namespace std::chrono_literals;
using fastcascade::Team;

constexpr int64_t kPhases = 40, kMaxParts = 16;
constexpr int kCalls = 300;

// What happens in a call, besides the work.
enum Event { nothing, late_helpers, stalled_helper, stalled_rank_0, kEvents };

struct Call {
  Team team{kMaxParts};
  std::vector<int64_t> parts;  // of each phase
  std::vector<std::atomic<int>> runs;
  std::atomic<bool> has_stalled{false};

  explicit Call(uint32_t seed) : runs(kPhases * kMaxParts) {
    std::minstd_rand random(seed);
    for (int64_t p = 0; p < kPhases; ++p) parts.push_back(1 + random() % kMaxParts);
  }

  void check_done_before(int64_t phase) const {
    for (int64_t p = 0; p < phase; ++p)
      for (int64_t i = 0; i < parts[p]; ++i)
        if (runs[p * kMaxParts + i].load() != 1) fail("phase %ld began before part %ld of phase %ld", phase, i, p);
  }

  template <class... Args>
  static void fail(const char* format, Args... args) {
    std::printf(format, args...);
    std::printf("\n");
    std::exit(1);
  }

  // Once in a call: the others should soon go on without this thread.
  void stall(const Team::Member& member) {
    if (member.size == 1 || has_stalled.exchange(true)) return;
    for (int ms = 0; !team.is_closed(); ++ms) {
      if (ms > 10'000) fail("rank %ld stalls, and the others wait for it", member.rank);
      std::this_thread::sleep_for(1ms);
    }
  }

  void run(Team::Member member, Event event) {
    for (int64_t p = 0; p < kPhases; ++p)
      team.run_phase(member, parts[p], [&](int64_t i) {
        check_done_before(p);
        if (event == (member.rank > 0 ? stalled_helper : stalled_rank_0) && p > kPhases / 2) stall(member);
        if (runs[p * kMaxParts + i].fetch_add(1) != 0) fail("part %ld of phase %ld runs twice", i, p);
      });
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int threads = std::atoi(argv[1]);
  for (int i = 0; i < kCalls; ++i) {
    const auto event = static_cast<Event>(i % kEvents);
    Call call(static_cast<uint32_t>(i + 1));
    fastcascade::run_on_helpers(threads, [&](int rank, int helpers) {
      if (event == late_helpers && rank > 0) std::this_thread::sleep_for(std::chrono::microseconds(i));
      call.run({rank, helpers + 1}, event);
    });
    call.check_done_before(kPhases);
  }
  std::printf("%d calls\n", kCalls);
}
