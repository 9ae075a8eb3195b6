// Which kernel computes a convolution: a fixed function of operation, shape and instruction set, so that the same
// plan gives the same bits on every run.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"
#include "stage_spec.h"

namespace fastcascade {

enum class ConvKernel { direct, depthwise, winograd };

// A group for every channel, with one output each.
bool is_depthwise(const OpSpec& op, const Shape& in);

// What Winograd can compute, neither strided nor dilated.
bool is_3x3_without_stride(const OpSpec& op);

// The kernel of a conv2d. `forced` is "conv_direct_f32" or "conv3x3_winograd_f32", used wherever it can run, or ""
// for the measured choice.
ConvKernel choose_conv_kernel(const OpSpec& op, const Shape& in, const Shape& out, const KernelTable& kernels,
                              const std::string& forced);

// Throws std::invalid_argument unless `forced` is one of the three.
void check_forced_kernel(const std::string& forced);

}  // namespace fastcascade
