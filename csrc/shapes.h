// Shape inference over a stage's operations, with every check that keeps a hostile plan from the kernels.
#pragma once

#include <vector>

#include "network.h"

namespace fastcascade {

// The shape of every value of the stage; operations must be in execution order. Throws std::invalid_argument.
std::vector<Shape> infer_shapes(const StageSpec& spec);

}  // namespace fastcascade
