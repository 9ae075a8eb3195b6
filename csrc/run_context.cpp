#include "run_context.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace fastcascade {

RunContext::RunContext(const Program& program)
    : buffers(program.threads),
      team(kMaxPartsPerThread * program.threads),
      tiles(program.threads),
      queues(program.networks.size()),
      free_slots(program.networks.size()),
      survives(static_cast<size_t>(program.queue_instances())) {
  int64_t arena = 0, scratch = 0;
  for (const Network& net : program.networks) {
    arena = std::max(arena, net.arena_floats);
    scratch = std::max(scratch, net.scratch_floats);
  }
  for (ThreadBuffers& b : buffers) {
    b.arena = Buffer(arena);
    b.scratch = Buffer(scratch);
    b.exit_head = Buffer(exit_head_floats(program.classes));
  }
  for (InstanceQueue& tile : tiles) tile.reserve(program.max_tile);
  const int64_t slots = program.feature_slots(program.threads);
  for (const Network& net : program.networks)
    features.emplace_back(net.features < 0 ? 0 : slots * net.values[net.features].floats);
}

void RunContext::start_batch(const Program& program, int64_t instances) {
  const auto n = static_cast<size_t>(instances);
  if (!program.stage_weights.empty()) {
    log_sum.assign(n * static_cast<size_t>(program.classes), -std::numeric_limits<float>::infinity());
    weight_sum.assign(n, 0.f);
  }
  previous_label.assign(n, -1);
  for (InstanceQueue& queue : queues) {
    queue.clear();
    queue.reserve(instances);
  }
  for (std::vector<int64_t>& slots : free_slots) {
    slots.resize(static_cast<size_t>(program.feature_slots(program.threads)));
    std::iota(slots.begin(), slots.end(), 0);
  }
}

}  // namespace fastcascade
