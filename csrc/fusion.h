// Rewriting a stage's operations before kernels are chosen.
#pragma once

#include <vector>

#include "stage_spec.h"

namespace fastcascade {

// True where a function of finite numbers is finite. Others do not join a convolution, whose padded channels must stay
// finite.
bool stays_finite(Function function);

// Lets the operation before an activation apply it, and turns x + activation(conv(y)) into one convolution whose
// residual is added last. `shapes` are those of all values.
void fuse_operations(StageSpec& stage, const std::vector<Shape>& shapes);

}  // namespace fastcascade
