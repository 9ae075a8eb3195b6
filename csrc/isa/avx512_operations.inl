// Vector operations of sixteen lanes that the float32 and the bf16 kernels share.

using V = __m512;
constexpr int kLanes = 16, kMr = 8, kNrBlocks = 2;
constexpr bool kFusedMultiplyAdd = true;
constexpr int kDirectRows[] = {14, 14, 7};  // pixels of the direct kernel's tile of 1, 2 and 3 blocks

FC_INLINE V zero() { return _mm512_setzero_ps(); }
FC_INLINE V broadcast(float x) { return _mm512_set1_ps(x); }
FC_INLINE V broadcast_pair(const float* p) {
  double two;
  std::memcpy(&two, p, sizeof two);
  return _mm512_castpd_ps(_mm512_set1_pd(two));
}
FC_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
FC_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
FC_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
FC_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
// Sums of adjacent lanes: those of a in the low half of each 128 bits, those of b in the high half.
FC_INLINE V pairwise_add(V a, V b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
FC_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
FC_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// Both instructions return their second operand if either is NaN, so a NaN in x stays.
FC_INLINE V clamp(V x, V low, V high) { return _mm512_min_ps(high, _mm512_max_ps(low, x)); }
FC_INLINE V maximum(V a, V b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
FC_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
FC_INLINE V square_root(V x) { return _mm512_sqrt_ps(x); }
FC_INLINE V absolute(V x) { return _mm512_abs_ps(x); }
FC_INLINE V select_positive(V x, V a, V b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), a);
}
FC_INLINE V low_bits_to_exponent(V x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
