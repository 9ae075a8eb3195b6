// The schedule for large batches where stages read features: threads take tiles, without a barrier between stages.
#pragma once

#include "cascade_run.h"

namespace fastcascade {

// A tile of instances goes through a whole stage while it is in cache. Survivors of several tiles wait in a queue until
// the next stage has a full tile. Every thread always takes the deepest full tile.
void run_depth_first_schedule(const CascadeRun& run);

}  // namespace fastcascade
