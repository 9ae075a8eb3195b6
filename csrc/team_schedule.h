// The schedule for small batches: all threads go through the stages together.
#pragma once

#include "cascade_run.h"

namespace fastcascade {

// For up to a tile of instances per thread. At each stage, every thread runs the same number of instances by itself.
// The remainder is run by all threads together, step by step, and so are all instances where there are fewer per thread
// than Network::min_rows_per_thread.
void run_team_schedule(const CascadeRun& run);

}  // namespace fastcascade
