// The AVX-512 and VNNI intrinsics of the int8 kernels, written out lane by lane, so that a machine without these
// instructions can run the kernels. Included in place of <immintrin.h>.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2")

namespace emulated {

template <class T, int N>
struct Vector {
  T lane[N];
};
using F16 = Vector<float, 16>;
using I16 = Vector<int32_t, 16>;

template <class V, class T>
V each(T function) {
  V v;
  for (int i = 0; i < 16; ++i) v.lane[i] = function(i);
  return v;
}
template <class V>
V from_memory(const void* p) {
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

inline F16 set1_ps(float x) {
  return each<F16>([=](int) { return x; });
}
inline F16 loadu_ps(const float* p) { return from_memory<F16>(p); }
inline void storeu_ps(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }
inline F16 add_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F16 sub_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F16 mul_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F16 min_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F16 max_ps(F16 a, F16 b) {
  return each<F16>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline I16 setzero_si512() { return I16{}; }
inline I16 set1_epi32(int32_t x) {
  return each<I16>([=](int) { return x; });
}
inline I16 loadu_si512(const void* p) { return from_memory<I16>(p); }
inline I16 add_epi32(I16 a, I16 b) {
  return each<I16>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i])); });
}
inline F16 cvtepi32_ps(I16 v) {
  return each<F16>([&](int i) { return static_cast<float>(v.lane[i]); });
}
inline I16 cvtps_epi32(F16 v) {
  return each<I16>([&](int i) { return static_cast<int32_t>(std::nearbyint(v.lane[i])); });
}
inline I16 cvtepu8_epi32(__m128i v) {
  uint8_t bytes[16];
  std::memcpy(bytes, &v, sizeof bytes);
  return each<I16>([&](int i) { return bytes[i]; });
}
inline __m128i cvtepi32_epi8(I16 v) {
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(v.lane[i]);
  return from_memory<__m128i>(bytes);
}
inline I16 madd_epi16(I16 a, I16 b) {
  return each<I16>([&](int i) { return multiply_pairs(a.lane[i], b.lane[i]); });
}
inline I16 dpbusd_epi32(I16 sum, I16 x, I16 w) {
  return each<I16>([&](int i) { return dot(sum.lane[i], x.lane[i], w.lane[i]); });
}
inline __m256i dpbusd_avx_epi32(__m256i sum, __m256i x, __m256i w) {
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
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_avx_epi32
