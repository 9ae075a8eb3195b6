// From operations to steps: kernels chosen, weights packed, explicit padding where a kernel needs it.
#pragma once

#include <string>
#include <vector>

#include "network.h"

namespace fastcascade {

// The network's values and steps. Memory is not planned yet. `shapes` and `bytes` are those of infer_shapes and
// infer_bytes; `bf16_kernels` and `forced` are as in build_network.
Network build_steps(const StageSpec& spec, const std::vector<Shape>& shapes, const std::vector<bool>& bytes,
                    const KernelTable& kernels, const Int8Kernels* int8_kernels, const Bf16Kernels* bf16_kernels,
                    const std::string& forced);

}  // namespace fastcascade
