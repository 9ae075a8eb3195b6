// Int8 kernels for any CPU: four lanes of the compiler's vector extension.
#include "int8_region.h"

namespace fastcascade {
namespace portable {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
using Term = int16_t;
constexpr int kLanes = 4, kGroup = 2, kRows = 4;

// Where the CPU has fused multiply-adds, compilers may contract a product and a sum, which rounds once instead of
// twice.
FC_INLINE F exact(F x) {
#ifdef __aarch64__
  asm("" : "+w"(x));
#endif
  return x;
}
template <class Vector>
FC_INLINE Vector load_vector(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FC_INLINE F broadcast(float x) { return F{x, x, x, x}; }
FC_INLINE F load(const float* p) { return load_vector<F>(p); }
FC_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
FC_INLINE F add(F a, F b) { return a + b; }
FC_INLINE F sub(F a, F b) { return a - b; }
FC_INLINE F mul(F a, F b) { return a * b; }
FC_INLINE F clamp(F x, F low, F high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}
FC_INLINE I zero_i32() { return I{0, 0, 0, 0}; }
FC_INLINE I broadcast_i32(int32_t x) { return I{x, x, x, x}; }
FC_INLINE I load_i32(const int32_t* p) { return load_vector<I>(p); }
// Unsigned, because sums may wrap on the way.
FC_INLINE I add(I a, I b) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a + (U)b);
}
FC_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
// Of numbers below 2²²: the sum has no bits for fractions, and rounds halves to even.
FC_INLINE I round_to_i32(F v) { return __builtin_convertvector(v + 12582912.f - 12582912.f, I); }
FC_INLINE I load_u8(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
FC_INLINE void store_u8(uint8_t* p, I v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
}
FC_INLINE I dot_bytes(I sum, I x, I w) { return add(sum, x * w); }
// A lane holds two terms, the first in its low half.
FC_INLINE I load_terms(const Term* p) { return load_vector<I>(p); }
FC_INLINE I broadcast_terms(const Term* p) {
  int32_t two;
  std::memcpy(&two, p, sizeof two);
  return broadcast_i32(two);
}
FC_INLINE I dot(I sum, I x, I w) {
  const I low = ((x << 16) >> 16) * ((w << 16) >> 16), high = (x >> 16) * (w >> 16);
  return add(sum, add(low, high));
}
// Eight terms.
typedef int16_t H __attribute__((vector_size(16)));
constexpr int kTermLanes = 8;
FC_INLINE H widen(const uint8_t* p) { return H{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
FC_INLINE void store_terms(Term* p, H v) { std::memcpy(p, &v, sizeof v); }
FC_INLINE H add_terms(H a, H b) { return a + b; }
FC_INLINE H sub_terms(H a, H b) { return a - b; }
FC_INLINE void store_i32(int32_t* p, I v) { std::memcpy(p, &v, sizeof v); }
FC_INLINE I sub(I a, I b) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a - (U)b);
}
FC_INLINE I quarter(I v) { return v >> 2; }
FC_INLINE void copy_terms(const uint8_t* from, int64_t count, Term* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

#include "../generic/int8_all.inl"
#include "../generic/int8_winograd.inl"

}  // namespace portable

const Int8Kernels portable_int8_kernels = portable::make_int8_kernels(
    "portable", portable::conv_int8<portable::VectorProducts>, portable::conv3x3_winograd_int8);

}  // namespace fastcascade
