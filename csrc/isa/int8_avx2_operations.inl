// Vector operations of eight lanes that AVX2 and AVX-VNNI share. Their target regions leave FMA out, so that compilers
// cannot contract a product and a sum.

using F = __m256;
using I = __m256i;

FC_INLINE F exact(F x) { return x; }
FC_INLINE F broadcast(float x) { return _mm256_set1_ps(x); }
FC_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
FC_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
FC_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FC_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FC_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FC_INLINE F clamp(F x, F low, F high) { return _mm256_min_ps(_mm256_max_ps(x, low), high); }
FC_INLINE I zero_i32() { return _mm256_setzero_si256(); }
FC_INLINE I broadcast_i32(int32_t x) { return _mm256_set1_epi32(x); }
FC_INLINE I load_i32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FC_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
FC_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
FC_INLINE I round_to_i32(F v) { return _mm256_cvtps_epi32(v); }
FC_INLINE I load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
FC_INLINE void store_u8(uint8_t* p, I v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
// A byte in every lane: vpmaddwd multiplies the low halves and adds the product of the high ones, where x has zeros.
FC_INLINE I dot_bytes(I sum, I x, I w) { return add(sum, _mm256_madd_epi16(x, w)); }
FC_INLINE I load_terms(const Term* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FC_INLINE I broadcast_terms(const Term* p) {
  int32_t terms;
  std::memcpy(&terms, p, sizeof terms);
  return _mm256_set1_epi32(terms);
}
