// Running one step of a network on a sub-tile of instances.
#pragma once

#include <algorithm>

#include "network.h"

namespace fastcascade {

// One thread's part of a step that several threads run together.
struct Share {
  int64_t rank = 0, size = 1;
};

// Where a stage's input comes from: images of the batch, or the features of the stage before.
struct Source {
  const void* images = nullptr;
  bool bytes = false;               // uint8 through `table`, else float32
  const float* table = nullptr;     // [channels][256]
  int64_t strides[4] = {};          // of (N, C, H, W), in elements
  const float* features = nullptr;  // rows of features_floats
  int64_t feature_floats = 0;
  const int64_t* rows = nullptr;  // which images or feature rows, one per instance
};

// Runs a step for `instances` instances starting at `first` of the tile.
void run_step(const Network& net, const Step& step, const Source& source, float* arena, float* scratch, int64_t first,
              int64_t instances, Share share);

// Runs all steps of a network on up to a tile of instances, one sub-tile after the other; calls after(i) when step i
// is done on a sub-tile.
template <class After>
void run_steps(const Network& net, const Source& source, float* arena, float* scratch, int64_t instances, Share share,
               After after) {
  for (const Segment& segment : net.segments)
    for (int64_t first = 0; first < instances; first += segment.instances) {
      const int64_t count = std::min(segment.instances, instances - first);
      for (size_t i = segment.begin; i < segment.end; ++i) {
        run_step(net, net.steps[i], source, arena, scratch, first, count, share);
        after(i);
      }
    }
}

}  // namespace fastcascade
