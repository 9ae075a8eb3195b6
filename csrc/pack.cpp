#include "pack.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace fastcascade {
namespace {

// Calls put(channel, first, lanes) for every output channel: the first channel of the block pair, or of the block
// without a partner, that it belongs to, and the lanes of that.
template <class Put>
void for_each_channel(int64_t channels, const KernelTable& kernels, Put put) {
  const int64_t pair = kernels.pair * kernels.lanes, paired = round_up(channels, kernels.lanes) / pair * pair;
  for (int64_t channel = 0; channel < channels; ++channel)
    if (channel < paired)
      put(channel, channel / pair * pair, pair);
    else
      put(channel, paired, kernels.lanes);
}

// Where a block without a partner keeps term i of its channel.
int64_t lone_place(int64_t channel, int64_t i, int64_t lanes) {
  return i / 2 * 2 * lanes + channel / 2 % 2 * lanes + channel / 4 * 4 + channel % 2 * 2 + i % 2;
}

}  // namespace

DenseWeights merge_groups(const OpSpec& op, int64_t lanes) {
  const auto& w = op.weight_shape;
  const int64_t per_group = w[0] / op.groups;
  if (op.groups == 1) return {op.weight, 1, w[0], w[1], w[2], w[3]};
  // The fewest neighbours whose outputs fill whole vectors; all of them where no such number divides.
  int64_t merged = lanes / std::gcd(lanes, per_group);
  if (op.groups % merged) merged = op.groups;
  const int64_t in = w[1] * merged, area = w[2] * w[3];
  if (in * area > kMaxFloats / w[0])
    throw std::invalid_argument("a convolution in " + std::to_string(op.groups) + " groups, whose " +
                                std::to_string(per_group) + " outputs each do not fill vectors, is too large");
  DenseWeights dense{std::vector<float>(w[0] * in * area), op.groups / merged, w[0], in, w[2], w[3]};
  for (int64_t o = 0; o < w[0]; ++o) {
    const int64_t place = o / per_group % merged;
    std::copy_n(&op.weight[o * w[1] * area], w[1] * area, &dense.weight[(o * in + place * w[1]) * area]);
  }
  return dense;
}

Buffer pack_direct(const DenseWeights& d, const KernelTable& kernels) {
  const int64_t per_group = d.out / d.groups, rows = d.kh * d.kw * d.in;
  Buffer packed(d.groups * round_up(per_group, kernels.lanes) * rows);
  for (int64_t g = 0; g < d.groups; ++g) {
    float* panel = packed.data() + g * per_group * rows;
    for_each_channel(per_group, kernels, [&](int64_t channel, int64_t first, int64_t lanes) {
      const float* weight = &d.weight[(g * per_group + channel) * rows];
      for (int64_t tap = 0; tap < d.kh * d.kw; ++tap)
        for (int64_t i = 0; i < d.in; ++i)
          panel[first * rows + (tap * d.in + i) * lanes + channel - first] = weight[i * d.kh * d.kw + tap];
    });
  }
  return packed;
}

WinogradWeights pack_winograd(const DenseWeights& d, const KernelTable& kernels) {
  const int64_t lanes = kernels.lanes, depth = winograd_depth(d.in), plane = depth * round_up(d.out, lanes);
  WinogradWeights packed{Buffer(9 * plane), Buffer(36 * plane)};
  for_each_channel(d.out, kernels, [&](int64_t channel, int64_t first, int64_t width) {
    for (int64_t i = 0; i < d.in; ++i) {
      const int64_t place =
          first * depth + (width == lanes ? lone_place(channel - first, i, lanes) : i * width + channel - first);
      float* vector = packed.plain.data() + place / lanes * 9 * lanes + place % lanes;
      const float* weight = &d.weight[(channel * d.in + i) * 9];
      for (int64_t tap = 0; tap < 9; ++tap) vector[tap * lanes] = weight[tap] / 9;
    }
  });
  kernels.transform_weights_f32(packed.plain.data(), plane / lanes, packed.transformed.data(), plane);
  return packed;
}

Buffer pack_depthwise(const OpSpec& op, int64_t pitch) {
  const int64_t area = op.kernel[0] * op.kernel[1];
  Buffer packed(area * pitch);
  for (int64_t c = 0; c < op.weight_shape[0]; ++c)
    for (int64_t tap = 0; tap < area; ++tap) packed.data()[tap * pitch + c] = op.weight[c * area + tap];
  return packed;
}

}  // namespace fastcascade
