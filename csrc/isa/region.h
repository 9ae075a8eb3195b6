// Included by every isa/*.cpp before its target region opens. Inline functions of standard headers must not be compiled
// inside the region: the linker merges them across files, and then every machine would run these instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../kernels.h"

#define FC_INLINE static inline __attribute__((always_inline))
#define FC_INLINE_METHOD inline __attribute__((always_inline))
#define FC_KERNEL static __attribute__((noinline))
#define FC_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define FC_UNROLL(n) FC_PRAGMA(clang loop unroll_count(n))
#else
#define FC_UNROLL(n) FC_PRAGMA(GCC unroll n)
#endif

namespace fastcascade {
extern const KernelTable portable_kernels;
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
}  // namespace fastcascade
