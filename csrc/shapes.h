// Shape inference over a stage's operations. All checks of a plan's sizes are here: the kernels make none.
#pragma once

#include <vector>

#include "stage_spec.h"

namespace fastcascade {

// The shape of every value of the stage. Throws std::invalid_argument where an operation does not fit its inputs.
std::vector<Shape> infer_shapes(const StageSpec& spec);

// Which values are bytes. Throws std::invalid_argument where an operation cannot read what it is given, or where the
// constants of an operation on bytes are out of range.
std::vector<bool> infer_bytes(const StageSpec& spec, size_t values);

}  // namespace fastcascade
