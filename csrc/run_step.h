// Running the steps of a network on a tile of instances.
#pragma once

#include <algorithm>

#include "source.h"
#include "step_parts.h"
#include "stripes.h"

namespace fastcascade {

// Where a thread finds values: private ones in its own arena, others in that of the thread that has the tile.
struct Arenas {
  float *tile, *own;
};

// Runs part of a step for the instances of a sub-tile, which begins at instance `first` of the tile.
void run_step(const Network& net, const Step& step, const Source& source, Arenas arenas, float* scratch, int64_t first,
              StepPart part);

// Visits all units for a tile of instances in the order in which they run: visit(unit, first, count) for the instances
// [first, first + count) of a sub-tile.
template <class Visit>
void visit_units(const Network& net, int64_t instances, Visit visit) {
  for (const Segment& segment : net.segments)
    for (int64_t first = 0; first < instances; first += segment.sub_tile_instances) {
      const int64_t count = std::min(segment.sub_tile_instances, instances - first);
      for (const Unit& unit : segment.units) visit(unit, first, count);
    }
}

// Runs all steps on up to a tile of instances, on this thread. Calls after(i) whenever step i is done on a stripe or a
// sub-tile.
template <class After>
void run_steps(const Network& net, const Source& source, float* arena, float* scratch, int64_t instances, After after) {
  visit_units(net, instances, [&](const Unit& unit, int64_t first, int64_t count) {
    const auto run = [&](size_t i, StepPart part) {
      run_step(net, net.steps[i], source, {arena, arena}, scratch, first, part);
      after(i);
    };
    if (!unit.is_chain()) return run(unit.begin, whole_step(net.steps[unit.begin], count));
    StripeRows none;
    run_stripes(net, unit, {0, count * output_rows(net, unit)}, none, std::ref(run));
  });
}

}  // namespace fastcascade
