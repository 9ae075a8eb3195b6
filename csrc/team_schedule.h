// The schedule in which all threads go through the stages together.
#pragma once

#include "cascade_run.h"

namespace fastcascade {

// A batch goes through the stages window by window. At each stage, every thread runs its share of the instances, then
// parts of shares that others have left. The instances that do not divide evenly among the threads are run by all
// threads together, step by step, and so are all instances where there are fewer per thread than
// Network::min_rows_per_thread. Before the last window, a stage leaves survivors in its queue until every thread has a
// full tile. For up to Program::team_instances.
void run_team_schedule(const CascadeRun& run);

}  // namespace fastcascade
