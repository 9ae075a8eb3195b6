// Rewriting a stage's operations before steps are built.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "stage_spec.h"

namespace fastcascade {

// True where a function of finite numbers is finite. Others do not join a convolution, whose padded channels must stay
// finite.
bool stays_finite(Function function);

// Lets the operation before an activation apply it, and turns x + activation(conv(y)) into one convolution whose
// residual is added last. `shapes` are those of all values.
void fuse_operations(StageSpec& stage, const std::vector<Shape>& shapes);

// Lets Winograd convolutions do the 2×2 max-pooling behind them. `shapes` are those of all values; `forced` is as in
// choose_conv_kernel.
void fuse_max_pools(StageSpec& stage, const std::vector<Shape>& shapes, const KernelTable& kernels,
                    const std::string& forced);

}  // namespace fastcascade
