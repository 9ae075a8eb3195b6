// What a kernel body needs from the machine that it runs on. Bodies are templates on a context: on a GPU the one
// below; in tests a host context with one OS thread per CUDA thread, so that the same code runs under a debugger
// and under ThreadSanitizer.
//
// A context has: thread(), threads(), lane(), warp(), warps(), block(), blocks(); sync(), which all threads of the
// block reach; shuffle_xor(value, mask), which all lanes of the warp reach.
#pragma once

#ifdef __CUDACC__
#define FC_FUNCTION __device__ inline
#else
#include <cmath>
#include <cstring>
#define FC_FUNCTION inline
#endif

namespace fastcascade {

constexpr int kWarp = 32;

FC_FUNCTION float infinity() { return __builtin_inff(); }

FC_FUNCTION float not_a_number() { return __builtin_nanf(""); }

// 16-bit floats as bits: no header of the CUDA toolkit is needed to compile.
struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// 16 bytes that move in one load.
struct alignas(16) Quad {
  unsigned int word[4];
};

FC_FUNCTION float to_float(float value) { return value; }

FC_FUNCTION float to_float(BFloat16 value) {
  const unsigned int bits = static_cast<unsigned int>(value.bits) << 16;
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

FC_FUNCTION float to_float(Half value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const int exponent = value.bits >> 10 & 31;
  const int mantissa = value.bits & 1023;
  float result = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                 : exponent == 31 ? (mantissa != 0 ? not_a_number() : infinity())
                                  : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return value.bits & 0x8000 ? -result : result;
#endif
}

template <class Context, class T>
FC_FUNCTION T warp_sum(Context& context, T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += context.shuffle_xor(value, mask);
  return value;
}

#ifdef __CUDACC__
struct DeviceContext {
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return blockDim.x; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  __device__ int warp() const { return threadIdx.x / kWarp; }
  __device__ int warps() const { return blockDim.x / kWarp; }
  __device__ int block() const { return blockIdx.x; }
  __device__ int blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
};
#endif

}  // namespace fastcascade
