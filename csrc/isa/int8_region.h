// Included by every isa/int8_*.cpp before its target region opens; see region.h.
#pragma once

#include "../int8.h"
#include "region.h"

namespace fastcascade {
extern const Int8Kernels portable_int8_kernels;
extern const Int8Kernels avx2_int8_kernels;
extern const Int8Kernels avxvnni_int8_kernels;
extern const Int8Kernels avx512vnni_int8_kernels;
extern const Int8Kernels amx_int8_kernels;
}  // namespace fastcascade
