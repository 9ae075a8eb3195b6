// Kernels for x86-64 with AVX-512 F: sixteen lanes, thirty-two registers.
#include "region.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,prefer-vector-width=512")
// GCC 12 warns about the undefined pass-through operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace fastcascade {
namespace avx512 {

#include "avx512_operations.inl"

#include "../generic/all.inl"

}  // namespace avx512

const KernelTable avx512_kernels = avx512::make_table("avx512");

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
