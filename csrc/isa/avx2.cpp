// Kernels for x86-64 with AVX2 and FMA: eight lanes, sixteen registers.
#include "region.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace fastcascade {
namespace avx2 {

using V = __m256;
constexpr int kLanes = 8, kMr = 6, kNrBlocks = 2;
constexpr bool kFusedMultiplyAdd = true;
constexpr int kDirectRows[] = {12, 6, 4};  // pixels of the direct kernel's tile of 1, 2 and 3 blocks

FC_INLINE V zero() { return _mm256_setzero_ps(); }
FC_INLINE V broadcast(float x) { return _mm256_set1_ps(x); }
FC_INLINE V broadcast_pair(const float* p) {
  double two;
  std::memcpy(&two, p, sizeof two);
  return _mm256_castpd_ps(_mm256_set1_pd(two));
}
FC_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
FC_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
FC_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
FC_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
// Sums of adjacent lanes: those of a in the low half of each 128 bits, those of b in the high half.
FC_INLINE V pairwise_add(V a, V b) {
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
FC_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
FC_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// Both instructions return their second operand if either is NaN, so a NaN in x stays.
FC_INLINE V clamp(V x, V low, V high) { return _mm256_min_ps(high, _mm256_max_ps(low, x)); }
FC_INLINE V maximum(V a, V b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
FC_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
FC_INLINE V square_root(V x) { return _mm256_sqrt_ps(x); }
FC_INLINE V absolute(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
FC_INLINE V select_positive(V x, V a, V b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}
FC_INLINE V low_bits_to_exponent(V x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }

#include "../generic/all.inl"

}  // namespace avx2

const KernelTable avx2_kernels = avx2::make_table("avx2");

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
