#include "kernel_choice.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fastcascade {
namespace {

#include "kernel_choice.inl"

// The index of the last of the ascending values that is ≤ x; 0 where there is none.
template <size_t N>
size_t bucket(const int (&values)[N], int64_t x) {
  size_t i = 0;
  while (i + 1 < N && values[i + 1] <= x) ++i;
  return i;
}

// True where Winograd was measured to be faster than the direct kernel.
bool winograd_is_faster(const std::string& isa, int64_t in_channels, const Shape& out) {
  // With an image's few channels Winograd gains next to nothing, and its rounding error would pass through every layer.
  if (in_channels < kChannels[0]) return false;
  constexpr size_t group = sizeof(kSides) / sizeof(kSides[0]) + 1;  // letters and the space after them
  const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(out.h * out.w)));
  const size_t letter = bucket(kChannels, out.c) * group + bucket(kSides, side);
  for (const Row& row : kRows)
    if (isa == row.isa && row.in_channels == kChannels[bucket(kChannels, in_channels)])
      return row.faster[letter] == 'W';
  return false;
}

bool can_use_depthwise(const OpSpec& op, const Shape& in) {
  return op.groups > 1 && op.groups == op.weight_shape[0] && op.weight_shape[1] == 1 && in.c == op.groups;
}

// True where each group's inputs and outputs fill whole vectors.
bool groups_fill_vectors(const OpSpec& op, int64_t lanes) {
  return op.weight_shape[0] / op.groups % lanes == 0 && op.weight_shape[1] % lanes == 0;
}

bool can_use_winograd(const OpSpec& op, int64_t lanes) {
  const std::array<int64_t, 2> one{1, 1}, three{3, 3};
  return op.kernel == three && op.stride == one && op.dilation == one &&
         (op.groups == 1 || groups_fill_vectors(op, lanes)) &&
         *std::max_element(op.padding.begin(), op.padding.end()) <= 1;
}

}  // namespace

ConvKernel choose_conv_kernel(const OpSpec& op, const Shape& in, const Shape& out, const KernelTable& kernels,
                              const std::string& forced) {
  if (forced == "conv_direct_f32") return ConvKernel::direct;
  if (can_use_depthwise(op, in)) return ConvKernel::depthwise;
  if (!can_use_winograd(op, kernels.lanes)) return ConvKernel::direct;
  const Shape group{op.weight_shape[0] / op.groups, out.h, out.w};
  const bool winograd = !forced.empty() || winograd_is_faster(kernels.isa, op.weight_shape[1], group);
  return winograd ? ConvKernel::winograd : ConvKernel::direct;
}

void check_forced_kernel(const std::string& forced) {
  if (!forced.empty() && forced != "conv_direct_f32" && forced != "conv3x3_winograd_f32")
    throw std::invalid_argument("unknown kernel '" + forced + "'; expected conv_direct_f32 or conv3x3_winograd_f32");
}

}  // namespace fastcascade
