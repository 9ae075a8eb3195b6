// Vector operations of sixteen lanes that the kernels for AVX-512 VNNI and for AMX share.

using F = __m512;
using I = __m512i;
constexpr int kLanes = 16;

using Term = uint8_t;  // the weights are signed
constexpr int kGroup = 4;

// Reads and writes by 64 terms.
FC_INLINE void copy_terms(const uint8_t* from, int64_t count, Term* to) {
  for (int64_t i = 0; i < count; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
}
// AVX-512 has fused multiply-adds, and GCC would contract a product and a sum.
FC_INLINE F exact(F x) {
  asm("" : "+v"(x));
  return x;
}
FC_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
FC_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FC_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
FC_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FC_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FC_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FC_INLINE F clamp(F x, F low, F high) { return _mm512_min_ps(_mm512_max_ps(x, low), high); }
FC_INLINE I zero_i32() { return _mm512_setzero_si512(); }
FC_INLINE I broadcast_i32(int32_t x) { return _mm512_set1_epi32(x); }
FC_INLINE I load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
FC_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
FC_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
FC_INLINE I round_to_i32(F v) { return _mm512_cvtps_epi32(v); }
FC_INLINE I load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FC_INLINE void store_u8(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
// A byte in every lane: vpdpwssd multiplies the low halves and adds the product of the high ones, where x has zeros.
FC_INLINE I dot_bytes(I sum, I x, I w) { return _mm512_dpwssd_epi32(sum, x, w); }
