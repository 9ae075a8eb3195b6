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
  explicit TeamSchedule(const CascadeRun& run) : run_(run) {}

  void run() {
    const auto work = [this](int rank, int helpers) {
      Team::Member member{rank, helpers + 1};
      run_member(member);
    };
    while (next_instance_ < run_.images.count) {
      queue_window();
      team().reset();
      run_on_helpers(static_cast<int>(run_.program.threads), std::ref(work));  // a copy would allocate
      for (size_t stage = 0; stage < run_.stages(); ++stage) queue(stage).erase_first(ready_instances(stage));
    }
  }

 private:
  const CascadeRun& run_;
  int64_t next_instance_ = 0;  // of the next window

  Team& team() const { return run_.context.team; }
  const Network& network(size_t stage) const { return run_.program.networks[stage]; }
  InstanceQueue& queue(size_t stage) const { return run_.context.queues[stage]; }
  ThreadBuffers& buffers(int64_t rank) const { return run_.context.buffers[static_cast<size_t>(rank)]; }

  void queue_window() {
    const int64_t end = std::min(run_.images.count, next_instance_ + run_.program.window_instances());
    for (; next_instance_ < end; ++next_instance_) queue(0).push(next_instance_, next_instance_);
  }

  // How many instances of a stage's queue run in this window.
  int64_t ready_instances(size_t stage) const {
    const int64_t waiting = queue(stage).size();
    if (stage == 0 || next_instance_ == run_.images.count) return waiting;
    return waiting - waiting % (run_.program.threads * network(stage).tile_instances);
  }

  // Queues change only in a phase of their own or between windows, so all members see the same.
  void run_member(Team::Member& member) const {
    for (size_t stage = 0; stage < run_.stages() && !member.has_left; ++stage) {
      const int64_t ready = ready_instances(stage);
      if (ready == 0) continue;
      int64_t per_thread = ready / member.size;
      if (per_thread < network(stage).min_rows_per_thread) per_thread = 0;
      if (per_thread > 0) run_shares(stage, member, per_thread);
      if (per_thread * member.size < ready) run_shared_instances(stage, member, {per_thread * member.size, ready});
      team().run_phase(member, 1, [&](int64_t) { queue_survivors(stage, ready); });
    }
  }

  // Runs the same number of instances on every thread. A share is cut into tiles; two smaller parts at its end are for
  // whoever is free first.
  void run_shares(size_t stage, Team::Member& member, int64_t share) const {
    const int64_t tile = network(stage).tile_instances;
    const int64_t most = kMaxPartsPerThread - 2, part = tile * ((share + tile * most - 1) / (tile * most));
    const int64_t whole = std::max<int64_t>(0, (share - part / 2 - 1) / part);
    const int64_t halves = share <= part || member.size == 1 ? 1 : 2;
    const auto begin_of = [&](int64_t i) {
      return i <= whole ? i * part : whole * part + (share - whole * part) * (i - whole) / halves;
    };
    const int64_t parts = whole + halves;
    team().run_phase(member, parts * member.size, [&](int64_t i) {
      const int64_t first = i / parts * share;
      run_instances(stage, buffers(member.rank), {first + begin_of(i % parts), first + begin_of(i % parts + 1)});
    });
  }

  // Runs instances of the queue on this thread.
  void run_instances(size_t stage, ThreadBuffers& buffers, Range instances) const {
    const Network& net = network(stage);
    for (int64_t first = instances.begin; first < instances.end; first += net.tile_instances) {
      const int64_t tile = std::min(net.tile_instances, instances.end - first);
      run_steps(net, source(stage, first), buffers.arena.data(), buffers.scratch.data(), tile);
      run_exits(stage, buffers, first, tile);
    }
  }

  // Runs instances of the queue with all members, step by step, in the arena of rank 0.
  void run_shared_instances(size_t stage, Team::Member& member, Range instances) const {
    const Network& net = network(stage);
    for (int64_t first = instances.begin; first < instances.end; first += net.tile_instances) {
      const int64_t tile = std::min(net.tile_instances, instances.end - first);
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
      const auto position = static_cast<size_t>(first + i);
      const bool survives = run_.survives_exit(stage, arena, i, queue(stage).instances[position], buffers.exit_head);
      run_.context.survives[position] = survives;
      if (survives) run_.save_features(stage, arena, i, first + i);
    }
  }

  // Queues the survivors of the first `ready` instances for the next stage. Their features stay in the slots that
  // run_exits has given them.
  void queue_survivors(size_t stage, int64_t ready) const {
    if (stage + 1 == run_.stages()) return;
    const InstanceQueue& from = queue(stage);
    for (int64_t i = 0; i < ready; ++i)
      if (run_.context.survives[static_cast<size_t>(i)])
        queue(stage + 1).push(from.instances[static_cast<size_t>(i)], i);
  }
};

}  // namespace

void run_team_schedule(const CascadeRun& run) { TeamSchedule(run).run(); }

}  // namespace fastcascade
