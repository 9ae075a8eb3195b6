// Running the steps of a network on a tile of instances.
#pragma once

#include <algorithm>

#include "network.h"
#include "source.h"

namespace fastcascade {

// One thread's share of a step that several threads run together.
struct Share {
  int64_t rank = 0, size = 1;
};

// Runs a step for instances [first, first + instances) of the tile.
void run_step(const Network& net, const Step& step, const Source& source, float* arena, float* scratch, int64_t first,
              int64_t instances, Share share);

// Runs all steps on up to a tile of instances, sub-tile by sub-tile. Calls after(i) whenever step i is done on a
// sub-tile.
template <class After>
void run_steps(const Network& net, const Source& source, float* arena, float* scratch, int64_t instances, Share share,
               After after) {
  for (const Segment& segment : net.segments)
    for (int64_t first = 0; first < instances; first += segment.sub_tile_instances) {
      const int64_t count = std::min(segment.sub_tile_instances, instances - first);
      for (size_t i = segment.begin; i < segment.end; ++i) {
        run_step(net, net.steps[i], source, arena, scratch, first, count, share);
        after(i);
      }
    }
}

}  // namespace fastcascade
