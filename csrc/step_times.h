// Times of a stage's single steps, for the microbenchmark. Cascades run without this.
#pragma once

#include <vector>

#include "run_step.h"

namespace fastcascade {

// Of one step, per instance.
struct StepTime {
  double bytes;    // read and written as stored: inputs, output, and a share of the weights
  double seconds;  // median. All threads count together: with two threads, half of the time that each takes
};

// Runs a network on the instances of `source`, at most a tile of them, for some seconds, once at least and 64 times at
// most. As in a large batch, every thread runs all steps in buffers of its own.
std::vector<StepTime> time_steps(const Network& net, const Source& source, int64_t instances, int threads,
                                 double seconds);

}  // namespace fastcascade
