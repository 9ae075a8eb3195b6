// Int8 kernels for x86-64 with AVX-512 VNNI: sixteen lanes, thirty-two registers, vpdpbusd.
#include "int8_region.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni,avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vnni,avx2,prefer-vector-width=512")
// GCC 12 warns about the undefined pass-through operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace fastcascade {
namespace avx512vnni {

constexpr int kRows = 12;

#include "int8_avx512_operations.inl"

FC_INLINE I load_terms(const Term* p) { return _mm512_loadu_si512(p); }
FC_INLINE I broadcast_terms(const Term* p) {
  int32_t terms;
  std::memcpy(&terms, p, sizeof terms);
  return _mm512_set1_epi32(terms);
}
FC_INLINE I dot(I sum, I x, I w) { return _mm512_dpbusd_epi32(sum, x, w); }

#include "../generic/int8_all.inl"

}  // namespace avx512vnni

const Int8Kernels avx512vnni_int8_kernels =
    avx512vnni::make_int8_kernels("avx512vnni", avx512vnni::conv_int8<avx512vnni::VectorProducts>, nullptr);

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
