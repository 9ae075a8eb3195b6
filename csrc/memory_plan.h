// Memory planning: how many instances run together, and where each value lies in a thread's arena.
#pragma once

#include "network.h"

namespace fastcascade {

// Sets the tile, the segments, the place of every value and the size of the arena. Throws std::invalid_argument where
// the activations of a single instance exceed kMaxFloats.
void plan_memory(Network& net);

}  // namespace fastcascade
