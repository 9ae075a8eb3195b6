// Written by tools/choose_kernels.py from measurements; run it again instead of editing.
//
// One row per instruction set and input channels, one group of letters per output channels, one letter per
// side of the output map: D where the direct kernel was faster, W where Winograd was.
#include "choices.h"

#include <cmath>

namespace fastcascade {
namespace {

constexpr int kChannels[] = {8, 16, 32, 64, 128, 256};
constexpr int kSides[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 28, 32};

struct Row {
  const char* isa;
  int in_channels;
  const char* faster;
};
constexpr Row kRows[] = {
    {"avx512", 8, "DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWWWWWWWWWWW DDWWDWWWWWWWWW"},
    {"avx512", 16, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx512", 32, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx512", 64, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx512", 128, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx512", 256, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx2", 8, "DDWWDWWWDWWWWW DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWDWWWWWWWWW"},
    {"avx2", 16, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx2", 32, "DDWWDWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx2", 64, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx2", 128, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"avx2", 256, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"portable", 8, "DDWWDWWWWWWWWW DDWWDWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"portable", 16, "DDWWDWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"portable", 32, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"portable", 64, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"portable", 128, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
    {"portable", 256, "DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW DDWWWWWWWWWWWW"},
};

// The last of the ascending values that is not above x; the first where all are.
template <size_t N>
size_t bucket(const int (&values)[N], int64_t x) {
  size_t i = 0;
  while (i + 1 < N && values[i + 1] <= x) ++i;
  return i;
}

}  // namespace

bool prefers_winograd(const std::string& isa, int64_t in_channels, int64_t out_channels, int64_t height,
                      int64_t width) {
  // An image's few channels gain next to nothing, and an error made there goes through every layer.
  if (in_channels < kChannels[0]) return false;
  constexpr size_t group = sizeof(kSides) / sizeof(kSides[0]) + 1;  // letters and the blank after them
  const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(height * width)));
  const size_t letter = bucket(kChannels, out_channels) * group + bucket(kSides, side);
  for (const Row& row : kRows)
    if (isa == row.isa && row.in_channels == kChannels[bucket(kChannels, in_channels)])
      return row.faster[letter] == 'W';
  return false;
}

}  // namespace fastcascade
