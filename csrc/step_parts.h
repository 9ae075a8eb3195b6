// How threads divide a step among them.
#pragma once

#include "network.h"

namespace fastcascade {

// What one call of run_step does of a step: `positions` counts its work items over all instances of the call.
struct StepPart {
  Range positions, panels;
};

inline StepPart whole_step(const Step& step, int64_t instances) {
  return {{0, step.work_items * instances}, {0, step.panels}};
}

constexpr int64_t max_parts(int64_t threads) { return 2 * threads; }

// A unit cut into parts along positions, or along panels of channels. A fixed function of the unit and the numbers of
// instances and threads.
struct UnitCut {
  int64_t parts;
  bool along_panels;
};
UnitCut cut_unit(const Network& net, const Unit& unit, int64_t instances, int64_t threads);
// A part of a step by itself.
StepPart part_of(const Step& step, int64_t instances, UnitCut cut, int64_t index);
// A part of a chain, as rows of its last output over all instances.
Range rows_of_part(const Network& net, const Unit& chain, int64_t instances, UnitCut cut, int64_t index);

}  // namespace fastcascade
