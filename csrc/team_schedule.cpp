#include "team_schedule.h"

#include <algorithm>
#include <atomic>
#include <functional>

#include "run_step.h"
#include "threads.h"

namespace fastcascade {
namespace {

constexpr int64_t kJoinSpins = 8000;  // per eight images: some 200 µs

class TeamSchedule {
 public:
  explicit TeamSchedule(const CascadeRun& run) : run_(run), active_(run.images.count) {
    for (int64_t i = 0; i < active_; ++i) queue(0).push(i, i);
  }

  void run() {
    const auto work = [this](int rank, int helpers) {
      const int64_t member = rank == 0 ? form_team(helpers) : join_team();
      if (member >= 0) run_member(member);
    };
    run_on_helpers(static_cast<int>(run_.program.threads), std::ref(work));  // std::function would allocate for a copy
  }

 private:
  const CascadeRun& run_;
  std::atomic<int> joined_{0};        // helpers; -1 once the team is closed
  std::atomic<bool> started_{false};  // team_size_ is final
  int64_t team_size_ = 1;
  int64_t active_;  // instances at the current stage
  Barrier barrier_;

  InstanceQueue& queue(size_t stage) const { return run_.context.queues[stage]; }
  ThreadBuffers& buffers(int64_t member) const { return run_.context.buffers[static_cast<size_t>(member)]; }

  // Waits for helpers, longer if there is more to do, then closes the team. Returns member 0.
  int64_t form_team(int helpers) {
    const int64_t max_spins = kJoinSpins * std::max<int64_t>(1, run_.images.count / 8);
    Backoff backoff;
    while (joined_.load() < helpers && backoff.count() < max_spins) backoff.pause();
    team_size_ = 1 + joined_.exchange(-1);
    barrier_.set_size(static_cast<int>(team_size_));
    started_.store(true);
    return 0;
  }

  // Returns the helper's number in the team, or -1 if it is too late.
  int64_t join_team() {
    int joined = joined_.load();
    do {
      if (joined < 0) return -1;
    } while (!joined_.compare_exchange_weak(joined, joined + 1));
    Backoff backoff;
    while (!started_.load()) backoff.pause();
    return joined + 1;
  }

  void run_member(int64_t member) {
    for (size_t stage = 0; stage < run_.stages() && active_ > 0; ++stage) {
      const Network& net = run_.program.networks[stage];
      int64_t per_thread = active_ / team_size_;
      if (per_thread < net.min_rows_per_thread) per_thread = 0;
      run_own_instances(stage, member, per_thread);
      if (per_thread * team_size_ < active_) run_shared_instances(stage, member, per_thread * team_size_);
      barrier_.wait();
      if (member == 0) compact(stage);
      barrier_.wait();
    }
  }

  // Runs this member's `count` instances in its own buffers.
  void run_own_instances(size_t stage, int64_t member, int64_t count) {
    const Network& net = run_.program.networks[stage];
    const int64_t begin = member * count, end = begin + count;
    for (int64_t first = begin; first < end; first += net.tile_instances) {
      const int64_t tile = std::min(net.tile_instances, end - first);
      run_steps(net, source(stage, first), buffers(member).arena.data(), buffers(member).scratch.data(), tile, {},
                [](size_t) {});
      run_exits(stage, buffers(member), first, tile);
    }
  }

  // Runs the instances from `first` on with all members, in the arena of member 0.
  void run_shared_instances(size_t stage, int64_t member, int64_t first) {
    barrier_.wait();  // until member 0 has finished with its arena
    const Network& net = run_.program.networks[stage];
    for (; first < active_; first += net.tile_instances) {
      const int64_t tile = std::min(net.tile_instances, active_ - first);
      run_steps(net, source(stage, first), buffers(0).arena.data(), buffers(member).scratch.data(), tile,
                {member, team_size_}, [this](size_t) { barrier_.wait(); });
      if (member == 0) run_exits(stage, buffers(0), first, tile);
      barrier_.wait();
    }
  }

  Source source(size_t stage, int64_t first) const {
    return run_.source(stage, queue(stage).instances.data() + first, queue(stage).slots.data() + first);
  }

  // Evaluates the exit for instances [first, first + count) of the queue, which lie in the arena of `buffers`.
  void run_exits(size_t stage, ThreadBuffers& buffers, int64_t first, int64_t count) const {
    const float* arena = buffers.arena.data();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t instance = queue(stage).instances[static_cast<size_t>(first + i)];
      const bool survives = run_.survives_exit(stage, arena, i, instance, buffers.exit_head);
      run_.context.survives[static_cast<size_t>(first + i)] = survives;
      if (survives) run_.save_features(stage, arena, i, first + i);
    }
  }

  // Queues the survivors for the next stage. Their features stay in the slots that run_exits has given them.
  void compact(size_t stage) {
    active_ = 0;
    if (stage + 1 == run_.stages()) return;
    const InstanceQueue& from = queue(stage);
    InstanceQueue& to = queue(stage + 1);
    for (int64_t i = 0; i < from.size(); ++i)
      if (run_.context.survives[static_cast<size_t>(i)]) to.push(from.instances[static_cast<size_t>(i)], i);
    active_ = to.size();
  }
};

}  // namespace

void run_team_schedule(const CascadeRun& run) { TeamSchedule(run).run(); }

}  // namespace fastcascade
