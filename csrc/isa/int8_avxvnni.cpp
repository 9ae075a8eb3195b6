// Int8 kernels for x86-64 with AVX-VNNI: as AVX2, but with vpdpbusd.
#include "int8_region.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avxvnni")
#endif

namespace fastcascade {
namespace avxvnni {

constexpr int kLanes = 8, kRows = 6;

#include "int8_vnni_terms.inl"

#include "int8_avx2_operations.inl"

FC_INLINE I dot(I sum, I x, I w) {
  sum = _mm256_dpbusd_avx_epi32(sum, x, w);
  asm volatile("" : "+x"(sum));  // or GCC reorders the products and spills the sums
  return sum;
}

#include "../generic/int8.inl"

}  // namespace avxvnni

const Int8Kernels avxvnni_int8_kernels = avxvnni::make_int8_kernels("avxvnni", nullptr);

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
