// The weights of a resize, computed once per layer.
#pragma once

#include <vector>

#include "stage_spec.h"

namespace fastcascade {

// For each of `out` lines along an axis of `in` lines, the same number of source lines with their weights:
// [output line][tap]. The coordinates are those of torch.nn.functional.interpolate.
std::vector<WeightedLine> resize_lines(const OpSpec& op, int64_t in, int64_t out);

}  // namespace fastcascade
