// bf16 kernels for x86-64 with AVX512-BF16: vdpbf16ps multiplies two pairs and adds both products, in sixteen lanes.
#include "bf16_region.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
// GCC 12 warns about the undefined pass-through operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace fastcascade {
namespace avx512bf16 {

#include "avx512_operations.inl"

FC_INLINE V dot(V x, V w, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
// Sixteen numbers as eight pairs.
FC_INLINE void store_bf16(float* pairs, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(v));
}

// clang-format off
#include "../generic/functions.inl"
#include "../generic/epilogue.inl"
#include "../generic/gemm.inl"
#include "../generic/pixel_runs.inl"
#include "../generic/direct.inl"
#include "../generic/bf16.inl"
// clang-format on

}  // namespace avx512bf16

const Bf16Kernels avx512_bf16_kernels = avx512bf16::make_bf16_kernels();

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
