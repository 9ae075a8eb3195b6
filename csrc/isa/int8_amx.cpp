// Int8 kernels for x86-64 with AMX: products in tiles of 16 × 16 sums, everything else in vectors of AVX-512 VNNI.
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
namespace amx {

constexpr int kRows = 64, kLeastRows = 16, kRunUnit = 64, kChunkTerms = 640 << 10;

#include "int8_avx512_operations.inl"

FC_INLINE void store_128(uint8_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
FC_INLINE void store_256(uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
FC_INLINE void store_512(uint8_t* p, I v) { _mm512_storeu_si512(p, v); }

// clang-format off
#include "../generic/int8.inl"
#include "../generic/int8_terms.inl"
#include "int8_amx_tiles.inl"
#include "../generic/int8_conv.inl"
#include "../generic/int8_others.inl"
// clang-format on

static void conv_int8_in_tiles(const Int8Conv& c, Range items, Range panels) {
  const TileRegisters registers;
  const auto conv = !c.epilogue.to_bytes  ? conv_int8<TileProducts<Output::floats>>
                    : c.epilogue.residual ? conv_int8<TileProducts<Output::bytes_with_residual>>
                                          : conv_int8<TileProducts<Output::bytes>>;
  conv(c, items, panels);
}

}  // namespace amx

const Int8Kernels amx_int8_kernels = amx::make_int8_kernels("amx", amx::conv_int8_in_tiles, nullptr);

}  // namespace fastcascade

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
