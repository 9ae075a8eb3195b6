// The AVX-512, VNNI and BF16 intrinsics of the kernels, written out lane by lane, so that a machine without these
// instructions can run the kernels. Included in place of <immintrin.h>. They are calls: inlined, they would make the
// kernels too large to compile, and a product and a sum could be contracted.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define EMULATED static __attribute__((noinline))

namespace emulated {

template <class T, int N>
struct Vector {
  T lane[N];
};
using F16 = Vector<float, 16>;
using I16 = Vector<int32_t, 16>;

template <class V, class T>
inline V each(T function) {
  V v;
  for (int i = 0; i < 16; ++i) v.lane[i] = function(i);
  return v;
}
template <class V>
inline V from_memory(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Four products of unsigned and signed bytes, and a sum that wraps.
inline int32_t dot(int32_t sum, int32_t x, int32_t w) {
  uint32_t total = static_cast<uint32_t>(sum);
  for (int i = 0; i < 4; ++i)
    total += static_cast<uint32_t>(static_cast<uint8_t>(static_cast<uint32_t>(x) >> 8 * i) *
                                   static_cast<int8_t>(static_cast<uint32_t>(w) >> 8 * i));
  return static_cast<int32_t>(total);
}
inline int32_t multiply_pairs(int32_t x, int32_t w) {
  const auto half = [](int32_t v, int i) { return static_cast<int16_t>(static_cast<uint32_t>(v) >> 16 * i); };
  return half(x, 0) * half(w, 0) + half(x, 1) * half(w, 1);
}

EMULATED F16 set1_ps(float x) {
  return each<F16>([=](int) { return x; });
}
EMULATED F16 loadu_ps(const float* p) { return from_memory<F16>(p); }
EMULATED void storeu_ps(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }
EMULATED F16 add_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] + b.lane[i]; });
}
EMULATED F16 sub_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] - b.lane[i]; });
}
EMULATED F16 mul_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] * b.lane[i]; });
}
EMULATED F16 min_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
EMULATED F16 max_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
EMULATED I16 setzero_si512() { return I16{}; }
EMULATED I16 set1_epi32(int32_t x) {
  return each<I16>([=](int) { return x; });
}
EMULATED I16 loadu_si512(const void* p) { return from_memory<I16>(p); }
EMULATED void storeu_si512(void* p, I16 v) { std::memcpy(p, &v, sizeof v); }
EMULATED I16 add_epi32(I16 a, I16 b) {
  return each<I16>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i])); });
}
EMULATED F16 cvtepi32_ps(I16 v) {
  return each<F16>([&](int i) { return static_cast<float>(v.lane[i]); });
}
EMULATED I16 cvtps_epi32(F16 v) {
  return each<I16>([&](int i) { return static_cast<int32_t>(std::nearbyint(v.lane[i])); });
}
EMULATED I16 cvtepu8_epi32(__m128i v) {
  uint8_t bytes[16];
  std::memcpy(bytes, &v, sizeof bytes);
  return each<I16>([&](int i) { return bytes[i]; });
}
EMULATED __m128i cvtepi32_epi8(I16 v) {
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(v.lane[i]);
  return from_memory<__m128i>(bytes);
}
EMULATED I16 dpwssd_epi32(I16 sum, I16 a, I16 b) {
  return each<I16>([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(sum.lane[i]) +
                                static_cast<uint32_t>(multiply_pairs(a.lane[i], b.lane[i])));
  });
}
EMULATED I16 dpbusd_epi32(I16 sum, I16 x, I16 w) {
  return each<I16>([&](int i) { return dot(sum.lane[i], x.lane[i], w.lane[i]); });
}
// ---- float32 ----

using Mask = uint16_t;

template <class To, class From>
inline To same_bits(const From& v) {
  return from_memory<To>(&v);
}
template <class T>
inline Mask mask_of(T condition) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(condition(i)) << i;
  return static_cast<Mask>(mask);
}
EMULATED F16 setzero_ps() { return F16{}; }
EMULATED F16 set1_pd(double x) {
  float halves[2];
  std::memcpy(halves, &x, sizeof x);
  return each<F16>([&](int i) { return halves[i % 2]; });
}
EMULATED F16 castpd_ps(F16 v) { return v; }
EMULATED F16 shuffle_ps(F16 a, F16 b, int choice) {
  return each<F16>([&](int i) { return (i % 4 < 2 ? a : b).lane[i / 4 * 4 + (choice >> 2 * (i % 4) & 3)]; });
}
EMULATED F16 fmadd_ps(F16 a, F16 b, F16 c) {
  return each<F16>([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
EMULATED F16 div_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] / b.lane[i]; });
}
EMULATED F16 sqrt_ps(F16 v) {
  return each<F16>([&](int i) { return __builtin_sqrtf(v.lane[i]); });
}
EMULATED F16 abs_ps(F16 v) {
  return each<F16>([&](int i) { return __builtin_fabsf(v.lane[i]); });
}
EMULATED Mask cmp_ps_mask(F16 a, F16 b, int predicate) {
  if (predicate == _CMP_GT_OQ) return mask_of([&](int i) { return a.lane[i] > b.lane[i]; });
  return mask_of([&](int i) { return __builtin_isunordered(a.lane[i], b.lane[i]); });  // _CMP_UNORD_Q
}
EMULATED F16 mask_mov_ps(F16 otherwise, Mask mask, F16 v) {
  return each<F16>([&](int i) { return mask >> i & 1 ? v.lane[i] : otherwise.lane[i]; });
}
EMULATED I16 slli_epi32(I16 v, int count) {
  return each<I16>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(v.lane[i]) << count); });
}

// ---- bf16, as Intel's manual defines the instructions ----

inline float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.f, x) : x; }
// The number whose upper half is the upper half of these bits.
inline float of_upper_half(uint32_t bits) { return flushed(same_bits<float>(bits & 0xffff0000u)); }
// The second products first; each sum rounds once.
EMULATED F16 dpbf16_ps(F16 sum, F16 a, F16 b) {
  return each<F16>([&](int i) {
    const uint32_t x = same_bits<uint32_t>(a.lane[i]), y = same_bits<uint32_t>(b.lane[i]);
    const float second = flushed(__builtin_fmaf(of_upper_half(x), of_upper_half(y), flushed(sum.lane[i])));
    return flushed(__builtin_fmaf(of_upper_half(x << 16), of_upper_half(y << 16), second));
  });
}
EMULATED __m256i cvtneps_pbh(F16 v) {
  uint16_t halves[16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = same_bits<uint32_t>(flushed(v.lane[i]));
    const bool is_nan = v.lane[i] != v.lane[i];
    halves[i] = static_cast<uint16_t>((is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
  return from_memory<__m256i>(halves);
}

// ---- AVX-VNNI ----

EMULATED __m256i dpbusd_avx_epi32(__m256i sum, __m256i x, __m256i w) {
  int32_t s[8], a[8], b[8];
  std::memcpy(s, &sum, sizeof s);
  std::memcpy(a, &x, sizeof a);
  std::memcpy(b, &w, sizeof b);
  for (int i = 0; i < 8; ++i) s[i] = dot(s[i], a[i], b[i]);
  return from_memory<__m256i>(s);
}

}  // namespace emulated

#pragma GCC pop_options

#define __m512 emulated::F16
#define __m512i emulated::I16
#define __m512bh emulated::F16
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_set1_pd emulated::set1_pd
#define _mm512_castpd_ps emulated::castpd_ps
#define _mm512_castps_si512 emulated::same_bits<emulated::I16>
#define _mm512_castsi512_ps emulated::same_bits<emulated::F16>
#define _mm512_shuffle_ps emulated::shuffle_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_sqrt_ps emulated::sqrt_ps
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_dpwssd_epi32 emulated::dpwssd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_avx_epi32
