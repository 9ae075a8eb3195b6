// Threads that run the phases of a call together.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace fastcascade {

constexpr int64_t kMaxPartsPerThread = 16;  // of a phase

// A phase is a number of parts that any member may run, in any order; it ends when all are done, and only then does the
// next begin. Every member calls run_phase for the same phases. Nobody is waited for: a part goes to whoever claims it
// first, and a member that comes late passes the phases that have ended.
//
// A thread that loses its processor in the middle of a part holds up the others for milliseconds. So a member that has
// waited for longer than it has worked closes the team: helpers leave it, and rank 0 goes on alone.
class Team {
 public:
  using Clock = std::chrono::steady_clock;

  // A thread's place in the team. Rank 0 stays to the end.
  struct Member {
    int64_t rank, size;  // size: of the team when all have come
    int64_t phase = 0;
    int64_t parts = 0;  // of all phases up to this one
    Clock::time_point since = Clock::now();
    Clock::duration worked{}, waited{};
    bool has_left = false;
  };

  explicit Team(int64_t max_parts) : claims_(static_cast<size_t>(max_parts)) {}

  // Before a call, while nobody is in the team.
  void reset();
  bool is_closed() const { return closed_.load(std::memory_order_relaxed); }

  // Calls run_part(i) for those i < parts that no other member claims; returns when all are done. Does nothing once the
  // member has left: it must not touch what later phases write.
  template <class RunPart>
  void run_phase(Member& member, int64_t parts, const RunPart& run_part) {
    if (member.size == 1) {
      for (int64_t i = 0; i < parts; ++i) run_part(i);
      return;
    }
    if (!begin_phase(member, parts)) return;
    // From the member's own share on, so that it mostly reads what it has written.
    const int64_t own = member.rank * parts / member.size;
    for (int64_t i = own; i < own + parts && has_unclaimed_parts(member); ++i) {
      const int64_t part = i < parts ? i : i - parts;
      if (!claim(member, part)) continue;
      run_part(part);
      done_.fetch_add(1, std::memory_order_release);
    }
    end_phase(member);
  }

 private:
  struct alignas(64) Claim {
    std::atomic<int64_t> phase{0};  // the last in which somebody has claimed this part
  };
  std::vector<Claim> claims_;
  alignas(64) std::atomic<int64_t> claimed_{0};  // parts, of all phases so far
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> closed_{false};  // to helpers

  bool begin_phase(Member& member, int64_t parts);  // false where the member has left
  bool has_unclaimed_parts(const Member& member) const {
    return claimed_.load(std::memory_order_relaxed) < member.parts;
  }
  bool claim(const Member& member, int64_t part);
  void end_phase(Member& member);
};

}  // namespace fastcascade
