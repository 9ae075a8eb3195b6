// The bf16 kernels: raw pointers in, raw pointers out, no checks. kernels/reference_bf16.py is their twin.
//
// bfloat16 is the upper half of a float32. Two of them, a pair, take the place of a float: the first in its low half.
// So a convolution in bf16 is the direct one of kernels.h on half as many terms, each of which is a pair; its sums,
// bias, residual and outputs are float32.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace fastcascade {

// Rounds the channels of pixels to pairs, to nearest even. The last pair of an odd number of channels ends in 0: what
// follows them may be NaN, which its weight of 0 would not remove.
struct Bf16Rounding {
  const float* input;
  float* output;
  int64_t channels, in_pitch, pitch;  // the latter in pairs
};

struct Bf16Kernels {
  int lanes;                                                         // output channels of a vector
  void (*conv_direct)(const DirectConv&, Range rows, Range panels);  // see KernelTable::conv_direct_f32
  void (*round)(const Bf16Rounding&, Range pixels);
};

// Why this machine cannot multiply in bf16 beside these float32 kernels; "" if it can.
std::string bf16_refusal(const KernelTable& kernels);

// Throws std::invalid_argument with the refusal, if there is one.
const Bf16Kernels& choose_bf16_kernels(const KernelTable& kernels);

}  // namespace fastcascade
