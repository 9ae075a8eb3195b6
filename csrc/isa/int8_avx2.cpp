// Int8 kernels for x86-64 with AVX2: eight lanes, sixteen registers.
//
// Bytes are widened to 16 bits when they are gathered, and vpmaddwd multiplies two of them and adds up exactly.
// vpmaddubsw would take bytes, but saturates: 2 · 255 · 127 exceeds 16 bits.
#include "int8_region.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace fastcascade {
namespace avx2 {

using Term = int16_t;
constexpr int kLanes = 8, kGroup = 2, kRows = 6;

#include "int8_avx2_operations.inl"

// The addition is spelled out: GCC would compute all products first and spill the sums, or copy every sum.
FC_INLINE I dot(I sum, I x, I w) {
  const I product = _mm256_madd_epi16(x, w);
  asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}

// Sixteen terms.
using H = __m256i;
constexpr int kTermLanes = 16;
FC_INLINE H widen(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FC_INLINE void store_terms(Term* p, H v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
FC_INLINE H add_terms(H a, H b) { return _mm256_add_epi16(a, b); }
FC_INLINE H sub_terms(H a, H b) { return _mm256_sub_epi16(a, b); }
FC_INLINE void store_i32(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
FC_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
FC_INLINE I quarter(I v) { return _mm256_srai_epi32(v, 2); }
// Reads and writes by 16 terms.
FC_INLINE void copy_terms(const uint8_t* from, int64_t count, Term* to) {
  for (int64_t i = 0; i < count; i += kTermLanes) store_terms(to + i, widen(from + i));
}

#include "../generic/int8_all.inl"
#include "../generic/int8_winograd.inl"

}  // namespace avx2

const Int8Kernels avx2_int8_kernels =
    avx2::make_int8_kernels("avx2", avx2::conv_int8<avx2::VectorProducts>, avx2::conv3x3_winograd_int8);

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
