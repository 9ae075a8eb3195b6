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

using Term = uint8_t;  // the weights are signed
constexpr int kGroup = 4;

// Reads and writes by 16 terms.
FC_INLINE void copy_terms(const uint8_t* from, int64_t count, Term* to) {
  for (int64_t i = 0; i < count; i += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}

#include "int8_avx2_operations.inl"

FC_INLINE I dot(I sum, I x, I w) {
  sum = _mm256_dpbusd_avx_epi32(sum, x, w);
  asm volatile("" : "+x"(sum));  // or GCC reorders the products and spills the sums
  return sum;
}

#include "../generic/int8_all.inl"

}  // namespace avxvnni

const Int8Kernels avxvnni_int8_kernels =
    avxvnni::make_int8_kernels("avxvnni", avxvnni::conv_int8<avxvnni::VectorProducts>, nullptr);

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
