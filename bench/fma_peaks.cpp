// Peaks of this machine: fused multiply-adds from registers, and copies that miss every cache.
// Prints one JSON object. Arguments: number of threads, milliseconds per measurement.
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Twelve accumulators: more than latency (4 cycles) times issue width (2), so no add waits for another; and with
// two factors they fit in the 16 registers of AVX2. Inline assembly, because a compiler may otherwise fold or
// reorder the chain.
#define TWELVE(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)

#define DECLARE_512(i) __m512 a##i = _mm512_setzero_ps();
#define FMA_512(i) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(a##i) : "v"(x), "v"(y));
#define BF16_512(i) asm volatile("vdpbf16ps %1, %2, %0" : "+v"(a##i) : "v"(x), "v"(y));
#define DECLARE_256(i) __m256 a##i = _mm256_setzero_ps();
#define FMA_256(i) asm volatile("vfmadd231ps %1, %2, %0" : "+x"(a##i) : "x"(x), "x"(y));

// Each returns floating-point operations done in about `limit` seconds, divided by the seconds taken.
#define DEFINE_PEAK(NAME, TARGET, VECTOR, SET, DECLARE, STEP, OPERATIONS)                 \
  __attribute__((target(TARGET))) double NAME(double limit) {                             \
    VECTOR x = SET(1e-3f), y = SET(0.5f);                                                 \
    TWELVE(DECLARE)                                                                       \
    long steps = 0;                                                                       \
    const auto start = Clock::now();                                                      \
    double seconds = 0;                                                                   \
    for (; seconds < limit; seconds = seconds_since(start))                               \
      for (int i = 0; i < 20000; i++, steps++) { TWELVE(STEP) }                           \
    return OPERATIONS * 12.0 * steps / seconds;                                           \
  }

DEFINE_PEAK(fp32_avx512, "avx512f", __m512, _mm512_set1_ps, DECLARE_512, FMA_512, 32)
DEFINE_PEAK(bf16_avx512, "avx512f,avx512bf16", __m512, _mm512_set1_ps, DECLARE_512, BF16_512, 64)
DEFINE_PEAK(fp32_avx2, "avx2,fma", __m256, _mm256_set1_ps, DECLARE_256, FMA_256, 16)

// Bytes read plus bytes written per second; each thread copies 64 MiB, far beyond its share of L3.
double copy(double limit) {
  const size_t size = size_t{64} << 20;
  std::vector<char> from(size, 1), to(size, 2);
  double bytes = 0, seconds = 0;
  const auto start = Clock::now();
  for (; seconds < limit; seconds = seconds_since(start), bytes += 2.0 * size)
    std::memcpy(to.data(), from.data(), size);
  return to[size / 2] == 1 ? bytes / seconds : 0;
}

double on_threads(int threads, double limit, const std::function<double(double)>& measure) {
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; t++) pool.emplace_back([&, t] { rates[t] = measure(limit); });
  double total = 0;
  for (int t = 0; t < threads; t++) {
    pool[t].join();
    total += rates[t];
  }
  return total / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double limit = (argc > 2 ? std::atof(argv[2]) : 100) / 1e3;
  std::printf("{\"threads\": %d", threads);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    std::printf(", \"fp32_avx2_gflops\": %.1f", on_threads(threads, limit, fp32_avx2));
  if (__builtin_cpu_supports("avx512f"))
    std::printf(", \"fp32_avx512_gflops\": %.1f", on_threads(threads, limit, fp32_avx512));
  if (__builtin_cpu_supports("avx512bf16"))
    std::printf(", \"bf16_avx512_gflops\": %.1f", on_threads(threads, limit, bf16_avx512));
  std::printf(", \"copy_gbs\": %.1f}\n", on_threads(threads, limit, copy));
}
