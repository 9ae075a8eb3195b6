#include "choices.h"

#include <cmath>

namespace fastcascade {
namespace {

#include "choices.inl"

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
