// From operations to steps: kernels chosen, weights packed, explicit padding where a kernel needs it.
#pragma once

#include <string>
#include <vector>

#include "network.h"

namespace fastcascade {

// The network's values and steps. Memory is not planned yet. `shapes` are those of infer_shapes.
Network build_steps(const StageSpec& spec, const std::vector<Shape>& shapes, const KernelTable& kernels,
                    const std::string& forced);

}  // namespace fastcascade
