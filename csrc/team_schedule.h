// The schedule for small batches and for the end of large ones: all threads go through the stages together.
#pragma once

#include "cascade_run.h"

namespace fastcascade {

// For up to a tile of instances per thread. At each stage, every thread runs the same number of instances by itself.
// The remainder is run by all threads together, step by step, and so are all instances where there are fewer per
// thread than Network::min_rows_per_thread.
void run_team_schedule(const CascadeRun& run);

// The same for the instances that wait in the queues of the stages, at most Program::team_instances at any of them.
void run_queues_as_team(const CascadeRun& run);

}  // namespace fastcascade
