#include "team_schedule.h"

#include <algorithm>
#include <functional>

#include "run_step.h"
#include "team.h"
#include "threads.h"

namespace fastcascade {
namespace {

class TeamSchedule {
 public:
  explicit TeamSchedule(const CascadeRun& run) : run_(run) {
    for (int64_t i = 0; i < run.images.count; ++i) queue(0).push(i, i);
    team().reset();
  }

  void run() {
    const auto work = [this](int rank, int helpers) {
      Team::Member member{rank, helpers + 1};
      run_member(member);
    };
    run_on_helpers(static_cast<int>(run_.program.threads), std::ref(work));  // std::function would allocate for a copy
  }

 private:
  const CascadeRun& run_;

  Team& team() const { return run_.context.team; }
  InstanceQueue& queue(size_t stage) const { return run_.context.queues[stage]; }
  ThreadBuffers& buffers(int64_t rank) const { return run_.context.buffers[static_cast<size_t>(rank)]; }

  void run_member(Team::Member& member) {
    for (size_t stage = 0; stage < run_.stages() && !member.has_left; ++stage) {
      const int64_t active = queue(stage).size();
      if (active == 0) return;
      int64_t per_thread = active / member.size;
      if (per_thread < run_.program.networks[stage].min_rows_per_thread) per_thread = 0;
      if (per_thread > 0)
        team().run_phase(member, member.size, [&](int64_t i) {
          run_instances(stage, buffers(member.rank), {i * per_thread, (i + 1) * per_thread});
        });
      if (per_thread * member.size < active) run_shared_instances(stage, member, per_thread * member.size);
      team().run_phase(member, 1, [&](int64_t) { queue_survivors(stage); });
    }
  }

  // Runs instances of the queue on this thread.
  void run_instances(size_t stage, ThreadBuffers& buffers, Range instances) const {
    const Network& net = run_.program.networks[stage];
    for (int64_t first = instances.begin; first < instances.end; first += net.tile_instances) {
      const int64_t tile = std::min(net.tile_instances, instances.end - first);
      run_steps(net, source(stage, first), buffers.arena.data(), buffers.scratch.data(), tile);
      run_exits(stage, buffers, first, tile);
    }
  }

  // Runs the instances from `first` on with all members, step by step, in the arena of rank 0.
  void run_shared_instances(size_t stage, Team::Member& member, int64_t first) const {
    const Network& net = run_.program.networks[stage];
    const int64_t active = queue(stage).size();
    for (; first < active; first += net.tile_instances) {
      const int64_t tile = std::min(net.tile_instances, active - first);
      const Source tile_source = source(stage, first);
      visit_steps(net, tile, [&](size_t i, int64_t sub_tile, int64_t count) {
        const Step& step = net.steps[i];
        const StepCut cut = cut_step(step, count, member.size);
        team().run_phase(member, cut.parts, [&](int64_t part) {
          run_step(net, step, tile_source, buffers(0).arena.data(), buffers(member.rank).scratch.data(), sub_tile,
                   part_of(step, count, cut, part));
        });
      });
      team().run_phase(member, 1, [&](int64_t) { run_exits(stage, buffers(0), first, tile); });
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
  void queue_survivors(size_t stage) const {
    if (stage + 1 == run_.stages()) return;
    const InstanceQueue& from = queue(stage);
    InstanceQueue& to = queue(stage + 1);
    for (int64_t i = 0; i < from.size(); ++i)
      if (run_.context.survives[static_cast<size_t>(i)]) to.push(from.instances[static_cast<size_t>(i)], i);
  }
};

}  // namespace

void run_team_schedule(const CascadeRun& run) { TeamSchedule(run).run(); }

}  // namespace fastcascade
