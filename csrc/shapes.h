// Shape inference over a stage's operations. All checks of a plan's sizes are here: the kernels make none.
#pragma once

#include <vector>

#include "stage_spec.h"

namespace fastcascade {

// The shape of every value of the stage. Throws std::invalid_argument where an operation does not fit its inputs.
std::vector<Shape> infer_shapes(const StageSpec& spec);

}  // namespace fastcascade
