// Timing the steps of a stage one by one, for the microbenchmark. Running a cascade does not come by here.
#pragma once

#include <vector>

#include "steps.h"

namespace fastcascade {

// What one step does for one instance.
struct StepTime {
  double bytes;    // read and written as stored: inputs and output, and its share of the weights
  double seconds;  // median; of all threads together: with two threads at work, half of what one of them took
};

// Runs a network on the same instances, at most a tile of them, for some seconds (at least once, at most 64 times)
// on every thread, each with buffers of its own, as in a large batch. `source.rows` names `instances` rows.
std::vector<StepTime> time_steps(const Network& net, const Source& source, int64_t instances, int threads,
                                 double seconds);

}  // namespace fastcascade
