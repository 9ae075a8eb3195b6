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

// A step cut into parts along positions, or along panels of channels. A fixed function of the step and the numbers of
// instances and threads.
struct StepCut {
  int64_t parts;
  bool along_panels;
};
StepCut cut_step(const Step& step, int64_t instances, int64_t threads);
StepPart part_of(const Step& step, int64_t instances, StepCut cut, int64_t index);

}  // namespace fastcascade
