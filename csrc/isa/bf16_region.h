// Included by isa/bf16_*.cpp before their target regions open; see region.h.
#pragma once

#include "../bf16.h"
#include "region.h"

namespace fastcascade {
extern const Bf16Kernels avx512_bf16_kernels;
}  // namespace fastcascade
