// Which kernel a 3×3 convolution with stride 1 gets: a fixed function of shape and instruction set, so that
// the same plan gives the same bits on every run.
#pragma once

#include <cstdint>
#include <string>

namespace fastcascade {

// True where Winograd is the faster of the two; from the committed table in choices.inl.
bool prefers_winograd(const std::string& isa, int64_t in_channels, int64_t out_channels, int64_t height, int64_t width);

}  // namespace fastcascade
