// Which kernels run here: CPUID for the instructions, XGETBV for the registers that the system saves.
#include <cstdlib>
#include <stdexcept>

#include "isa/region.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastcascade {
namespace {

#if defined(__x86_64__)
bool has_bits(unsigned value, unsigned bits) { return (value & bits) == bits; }

// True where the system saves the registers named by `state` (bits of XCR0) on a context switch.
bool system_saves(unsigned state) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return has_bits(low, state);
}

bool has_avx2() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has_bits(c, bit_FMA | bit_AVX)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has_bits(b, bit_AVX2) && system_saves(0x06);
}

bool has_avx512() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && has_bits(b, bit_AVX512F) && system_saves(0xe6);
}

const KernelTable* const kAvx512 = &avx512_kernels;
const KernelTable* const kAvx2 = &avx2_kernels;
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
const KernelTable* const kAvx512 = nullptr;
const KernelTable* const kAvx2 = nullptr;
#endif

bool always() { return true; }

const KernelTable& forced_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
    if (name != isa.name) continue;
    if (!isa.table)
      throw std::invalid_argument("instruction set '" + name +
                                  "' was asked for, but this build is for another "
                                  "architecture; use 'portable'");
    if (!isa.supported())
      throw std::invalid_argument("instruction set '" + name + "' was asked for, but it needs " + isa.needs +
                                  ", which this processor or its operating system lacks");
    return *isa.table;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; expected one of " + known);
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = {
      {"avx512", kAvx512, has_avx512, "AVX-512 F"},
      {"avx2", kAvx2, has_avx2, "AVX2 and FMA"},
      {"portable", &portable_kernels, always, "nothing special"},
  };
  return list;
}

const KernelTable& choose_isa(const std::string& name) {
  if (!name.empty()) return forced_isa(name);
  const char* forced = std::getenv("FASTCASCADE_ISA");
  if (forced && *forced) return forced_isa(forced);
  for (const Isa& isa : isas())
    if (isa.table && isa.supported()) return *isa.table;
  return portable_kernels;
}

}  // namespace fastcascade
