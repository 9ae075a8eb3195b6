// Kernels for any CPU: four lanes of the compiler's vector extension, which become SSE2 or NEON.
#include "region.h"

namespace fastcascade {
namespace portable {

typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int kLanes = 4, kMr = 6, kNrBlocks = 2;
constexpr bool kFusedMultiplyAdd = false;
constexpr int kDirectRows[] = {12, 6, 4};  // pixels of the direct kernel's tile of 1, 2 and 3 blocks

FC_INLINE V zero() { return V{0.f, 0.f, 0.f, 0.f}; }
FC_INLINE V broadcast(float x) { return V{x, x, x, x}; }
FC_INLINE V broadcast_pair(const float* p) { return V{p[0], p[1], p[0], p[1]}; }
FC_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FC_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
FC_INLINE V add(V a, V b) { return a + b; }
FC_INLINE V sub(V a, V b) { return a - b; }
// Sums of adjacent lanes: those of a, then those of b.
FC_INLINE V pairwise_add(V a, V b) { return V{a[0], a[2], b[0], b[2]} + V{a[1], a[3], b[1], b[3]}; }
FC_INLINE V mul(V a, V b) { return a * b; }
FC_INLINE V fma(V a, V b, V c) { return a * b + c; }
// Comparisons with NaN are false, so a NaN in x stays.
FC_INLINE V clamp(V x, V low, V high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
FC_INLINE V maximum(V a, V b) { return ((a != a) | (a > b)) ? a : b; }
FC_INLINE V div(V a, V b) { return a / b; }
FC_INLINE V square_root(V x) {
  return V{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}
FC_INLINE V absolute(V x) { return (V)((I)x & 0x7fffffff); }
FC_INLINE V select_positive(V x, V a, V b) { return x > 0.f ? a : b; }
FC_INLINE V low_bits_to_exponent(V x) { return (V)((I)x << 23); }

#include "../generic/all.inl"

}  // namespace portable

const KernelTable portable_kernels = portable::make_table("portable");

}  // namespace fastcascade
