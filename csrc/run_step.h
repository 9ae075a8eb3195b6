// Running the steps of a network on a tile of instances.
#pragma once

#include <algorithm>

#include "source.h"
#include "step_parts.h"

namespace fastcascade {

// Runs part of a step for the instances of a sub-tile, which begins at instance `first` of the tile.
void run_step(const Network& net, const Step& step, const Source& source, float* arena, float* scratch, int64_t first,
              StepPart part);

// Visits all steps for a tile of instances in the order in which they run: visit(i, first, count) for step i and the
// instances [first, first + count) of a sub-tile.
template <class Visit>
void visit_steps(const Network& net, int64_t instances, Visit visit) {
  for (const Segment& segment : net.segments)
    for (int64_t first = 0; first < instances; first += segment.sub_tile_instances) {
      const int64_t count = std::min(segment.sub_tile_instances, instances - first);
      for (size_t i = segment.begin; i < segment.end; ++i) visit(i, first, count);
    }
}

// Runs all steps on up to a tile of instances, on this thread.
inline void run_steps(const Network& net, const Source& source, float* arena, float* scratch, int64_t instances) {
  visit_steps(net, instances, [&](size_t i, int64_t first, int64_t count) {
    const Step& step = net.steps[i];
    run_step(net, step, source, arena, scratch, first, whole_step(step, count));
  });
}

}  // namespace fastcascade
