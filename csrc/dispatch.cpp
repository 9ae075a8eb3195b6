// Which kernels can run here: CPUID tells the instructions, XGETBV the registers that the operating system saves.
#include <cstdlib>
#include <stdexcept>

#include "isa/bf16_region.h"
#include "isa/int8_region.h"
#include "isa/region.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastcascade {
namespace {

#if defined(__x86_64__)
bool has_bits(unsigned value, unsigned bits) { return (value & bits) == bits; }

// True if the system saves the registers in `state` (bits of XCR0) on a context switch.
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

bool has_avx512vnni() {
  constexpr unsigned kAvx512bw = 1u << 30, kAvx512vnni = 1u << 11;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && has_bits(b, kAvx512bw) && has_bits(c, kAvx512vnni);
}

bool has_avxvnni() {
  constexpr unsigned kAvxvnni = 1u << 4;
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has_bits(a, kAvxvnni);
}

bool has_avx512bf16() {
  constexpr unsigned kAvx512bw = 1u << 30, kAvx512bf16 = 1u << 5;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && has_bits(b, kAvx512bw) &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && has_bits(a, kAvx512bf16);
}

// Linux lends a process the registers of tiles on request: they enlarge what it saves on a context switch.
bool system_lends_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx_int8() {
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  unsigned a, b, c, d;
  static const bool here = has_avx512vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
                           has_bits(d, kAmxTile | kAmxInt8) && system_saves(0x600e6) && system_lends_tiles();
  return here;
}

const KernelTable* const kAvx512 = &avx512_kernels;
const KernelTable* const kAvx2 = &avx2_kernels;
const Int8Kernels* const kAmxInt8 = &amx_int8_kernels;
const Int8Kernels* const kAvx512vnniInt8 = &avx512vnni_int8_kernels;
const Int8Kernels* const kAvxvnniInt8 = &avxvnni_int8_kernels;
const Int8Kernels* const kAvx2Int8 = &avx2_int8_kernels;
const Bf16Kernels* const kAvx512Bf16 = &avx512_bf16_kernels;
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
const KernelTable* const kAvx512 = nullptr;
bool has_amx_int8() { return false; }
bool has_avx512vnni() { return false; }
bool has_avxvnni() { return false; }
bool has_avx512bf16() { return false; }
const KernelTable* const kAvx2 = nullptr;
const Int8Kernels* const kAmxInt8 = nullptr;
const Int8Kernels* const kAvx512vnniInt8 = nullptr;
const Int8Kernels* const kAvxvnniInt8 = nullptr;
const Int8Kernels* const kAvx2Int8 = nullptr;
const Bf16Kernels* const kAvx512Bf16 = nullptr;
#endif

bool always() { return true; }

const KernelTable& forced_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
    if (name != isa.name) continue;
    if (!isa.table)
      throw std::invalid_argument("instruction set '" + name +
                                  "' was asked for, but this build is for another architecture; use 'portable'");
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

const std::vector<Int8Isa>& int8_isas() {
  static const std::vector<Int8Isa> list = {
      {"amx", kAmxInt8, has_amx_int8, "AMX for int8, AVX-512 VNNI, and a system that lends its registers"},
      {"avx512vnni", kAvx512vnniInt8, has_avx512vnni, "AVX-512 F, BW and VNNI"},
      {"avxvnni", kAvxvnniInt8, has_avxvnni, "AVX2 and AVX-VNNI"},
      {"avx2", kAvx2Int8, has_avx2, "AVX2"},
      {"portable", &portable_int8_kernels, always, "nothing special"},
  };
  return list;
}

const Int8Kernels& choose_int8_kernels(const KernelTable& kernels, const std::string& forced) {
  const bool is_forced = forced.rfind(kInt8Prefix, 0) == 0;
  std::string known;
  for (const Int8Isa& isa : int8_isas()) {
    const std::string name = kInt8Prefix + std::string(isa.name);
    known += (known.empty() ? "" : ", ") + name;
    const bool here = isa.kernels && isa.supported(), fits = here && kernels.lanes % isa.kernels->lanes == 0;
    if (!is_forced && fits) return *isa.kernels;
    if (forced != name) continue;
    if (!here) throw std::invalid_argument("kernels '" + name + "' need " + isa.needs + ", which is missing here");
    if (!fits)
      throw std::invalid_argument("kernels '" + name + "' have wider vectors than instruction set '" + kernels.isa +
                                  "'");
    return *isa.kernels;
  }
  throw std::invalid_argument("unknown kernels '" + forced + "'; expected one of " + known);
}

std::string bf16_refusal(const KernelTable& kernels) {
  const std::string others = "; fp32 and int8 run here";
  if (!has_avx512bf16())
    return "bf16 needs AVX-512 F, BW and BF16, which this processor or its operating system lacks" + others;
  if (kernels.lanes != kAvx512Bf16->lanes)
    return std::string("bf16 needs instruction set 'avx512', but '") + kernels.isa + "' was chosen" + others;
  return "";
}

const Bf16Kernels& choose_bf16_kernels(const KernelTable& kernels) {
  const std::string refusal = bf16_refusal(kernels);
  if (!refusal.empty()) throw std::invalid_argument(refusal);
  return *kAvx512Bf16;
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
