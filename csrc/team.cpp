#include "team.h"

#include <thread>

#include "threads.h"

namespace fastcascade {
namespace {

using namespace std::chrono_literals;

constexpr auto kPatience = 200us;  // beyond the time worked; members that begin a call wait for no good reason, too
constexpr auto kSpinTime = 1ms;    // then the processor goes to others: perhaps to the thread that is waited for
constexpr int kSpinsPerCheck = 64;

}  // namespace

void Team::reset() {
  for (Claim& claim : claims_) claim.phase.store(0, std::memory_order_relaxed);
  claimed_.store(0, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  closed_.store(false, std::memory_order_relaxed);
}

bool Team::begin_phase(Member& member, int64_t parts) {
  if (member.rank > 0 && is_closed()) member.has_left = true;
  ++member.phase;
  member.parts += parts;
  return !member.has_left;
}

// A later phase begins only when all parts of this one are claimed, so a late member finds none.
bool Team::claim(const Member& member, int64_t part) {
  std::atomic<int64_t>& phase = claims_[static_cast<size_t>(part)].phase;
  int64_t last = phase.load(std::memory_order_relaxed);
  if (last >= member.phase || !phase.compare_exchange_strong(last, member.phase, std::memory_order_relaxed))
    return false;
  claimed_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void Team::end_phase(Member& member) {
  const auto is_done = [&] { return done_.load(std::memory_order_acquire) >= member.parts; };
  Clock::time_point now = Clock::now();
  member.worked += now - member.since;
  member.since = now;
  if (is_done()) return;
  for (int spins = 1; !is_done(); ++spins) {
    spin_once();
    if (spins % kSpinsPerCheck != 0) continue;
    const Clock::duration waited = Clock::now() - member.since;
    if (member.waited + waited > kPatience + member.worked) {
      closed_.store(true, std::memory_order_relaxed);
      member.has_left = member.rank > 0;
      if (member.has_left) return;
    }
    if (waited > kSpinTime) std::this_thread::yield();
  }
  now = Clock::now();
  member.waited += now - member.since;
  member.since = now;
}

}  // namespace fastcascade
