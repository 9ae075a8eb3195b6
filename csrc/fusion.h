// Rewriting a stage's operations before kernels are chosen.
#pragma once

#include "stage_spec.h"

namespace fastcascade {

// Turns x + relu(conv(y)) into one convolution whose residual is added after the clamp.
void fuse_residual_adds(StageSpec& stage);

}  // namespace fastcascade
