// Rewriting a stage's operations before steps are built.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "stage_spec.h"

namespace fastcascade {

// Turns x + relu(conv(y)) into one convolution whose residual is added after the clamp.
void fuse_residual_adds(StageSpec& stage);

// Lets Winograd convolutions do the 2×2 max-pooling behind them. `shapes` are those of all values; `forced` is as in
// choose_conv_kernel.
void fuse_max_pools(StageSpec& stage, const std::vector<Shape>& shapes, const KernelTable& kernels,
                    const std::string& forced);

}  // namespace fastcascade
