#include "kernel_choice.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "pack.h"

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

}  // namespace

bool is_depthwise(const OpSpec& op, const Shape& in) {
  return op.groups > 1 && op.groups == op.weight_shape[0] && op.weight_shape[1] == 1 && in.c == op.groups;
}

bool is_3x3_without_stride(const OpSpec& op) {
  const std::array<int64_t, 2> one{1, 1}, three{3, 3};
  return op.kernel == three && op.stride == one && op.dilation == one;
}

ConvKernel choose_conv_kernel(const OpSpec& op, const Shape& in, const Shape& out, const KernelTable& kernels,
                              const std::string& forced) {
  if (forced == "conv_direct_f32") return ConvKernel::direct;
  if (is_depthwise(op, in)) return ConvKernel::depthwise;
  const bool pads_little = *std::max_element(op.padding.begin(), op.padding.end()) <= 1;
  if (!is_3x3_without_stride(op) || !pads_little) return ConvKernel::direct;
  // Channels of a group, merged with its neighbours as pack.h says.
  const int64_t merged = op.groups == 1 ? 1 : neighbours_to_merge(op, kernels.lanes);
  const int64_t group_in = op.weight_shape[1] * merged, group_out = op.weight_shape[0] / op.groups * merged;
  const bool fills_vectors = group_in % kernels.lanes == 0 && group_out % kernels.lanes == 0;
  if (merged < op.groups && !fills_vectors) return ConvKernel::direct;
  const bool winograd = !forced.empty() || winograd_is_faster(kernels.isa, group_in, {group_out, out.h, out.w});
  return winograd ? ConvKernel::winograd : ConvKernel::direct;
}

void check_forced_kernel(const std::string& forced) {
  if (!forced.empty() && forced != "conv_direct_f32" && forced != "conv3x3_winograd_f32")
    throw std::invalid_argument("unknown kernel '" + forced +
                                "'; expected conv_direct_f32 or conv3x3_winograd_f32, or int8_ and an instruction set");
}

}  // namespace fastcascade
