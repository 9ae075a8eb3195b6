#include "pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace fastcascade {
namespace {

// Merging may not make weights larger than this: 256 MiB, a dense 3×3 layer of 2,700 channels.
constexpr int64_t kMaxMergedFloats = int64_t{1} << 26;

// Calls put(channel, first, width) for every output channel: the first channel and the lanes of its panel.
template <class Put>
void for_each_channel(int64_t channels, const KernelTable& kernels, Put put) {
  const int64_t nr = kernels.nr(), paired = round_up(channels, kernels.lanes) / nr * nr;
  for (int64_t channel = 0; channel < channels; ++channel)
    if (channel < paired)
      put(channel, channel / nr * nr, nr);
    else
      put(channel, paired, kernels.lanes);
}

// Where an unpaired tail block keeps term i of its channel.
int64_t tail_offset(int64_t channel, int64_t i, int64_t lanes) {
  return i / 2 * 2 * lanes + channel / 2 % 2 * lanes + channel / 4 * 4 + channel % 2 * 2 + i % 2;
}

// The upper half of the nearest number that has no lower one; of halves the even one. NaN stays.
uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// As pack_direct, with `terms` terms of a tap side by side in each lane; `convert` makes a term of a weight.
template <class Term, class Convert>
Buffer pack_panels(const MergedWeights& m, int64_t lanes, int64_t terms, Convert convert) {
  const int64_t per_group = m.out / m.groups, blocks = round_up(per_group, lanes) / lanes, area = m.kh * m.kw;
  const int64_t depth = round_up(m.in, terms);
  Buffer packed(m.groups * blocks * lanes * area * depth / terms);
  Term* panel = reinterpret_cast<Term*>(packed.data());
  for (int64_t g = 0; g < m.groups; ++g)
    for (int64_t p = 0; p < panel_count(blocks); ++p) {
      const int64_t first = panel_begin(blocks, p) * lanes, width = panel_begin(blocks, p + 1) * lanes - first;
      for (int64_t o = first; o < std::min(first + width, per_group); ++o) {
        const float* weight = &m.weight[(g * per_group + o) * m.in * area];
        for (int64_t tap = 0; tap < area; ++tap)
          for (int64_t i = 0; i < m.in; ++i) {
            const int64_t at = tap * depth + i;
            panel[at / terms * width * terms + (o - first) * terms + at % terms] = convert(weight[i * area + tap]);
          }
      }
      panel += area * depth * width;
    }
  return packed;
}

}  // namespace

int64_t neighbours_to_merge(const OpSpec& op, int64_t lanes) {
  const int64_t merged = lanes / std::gcd(lanes, op.weight_shape[0] / op.groups);
  return op.groups % merged ? op.groups : merged;
}

MergedWeights merge_groups(const OpSpec& op, int64_t lanes) {
  const auto& w = op.weight_shape;
  if (op.groups == 1) return {op.weight, 1, w[0], w[1], w[2], w[3]};
  const int64_t per_group = w[0] / op.groups;
  const int64_t merged = neighbours_to_merge(op, lanes);
  const int64_t in = w[1] * merged, area = w[2] * w[3];
  if (merged > 1 && in * area > kMaxMergedFloats / w[0])
    throw std::invalid_argument("a convolution in " + std::to_string(op.groups) + " groups of " +
                                std::to_string(per_group) + " outputs is too large; its groups must be merged, " +
                                std::to_string(merged) + " at a time, because their outputs do not fill vectors");
  MergedWeights result{std::vector<float>(w[0] * in * area), op.groups / merged, w[0], in, w[2], w[3]};
  for (int64_t o = 0; o < w[0]; ++o) {
    const int64_t place = o / per_group % merged;
    std::copy_n(&op.weight[o * w[1] * area], w[1] * area, &result.weight[(o * in + place * w[1]) * area]);
  }
  return result;
}

Buffer pack_direct(const MergedWeights& m, int64_t lanes) {
  return pack_panels<float>(m, lanes, 1, [](float weight) { return weight; });
}

Buffer pack_direct_bf16(const MergedWeights& m, int64_t lanes) { return pack_panels<uint16_t>(m, lanes, 2, to_bf16); }

WinogradWeights pack_winograd(const MergedWeights& m, const KernelTable& kernels) {
  const int64_t lanes = kernels.lanes, per_group = m.out / m.groups, depth = winograd_depth(m.in);
  const int64_t plane = depth * round_up(per_group, lanes);
  WinogradWeights packed{Buffer(9 * m.groups * plane), Buffer(36 * m.groups * plane)};
  for (int64_t g = 0; g < m.groups; ++g) {
    float* group = packed.untransformed.data() + 9 * g * plane;
    for_each_channel(per_group, kernels, [&](int64_t channel, int64_t first, int64_t width) {
      for (int64_t i = 0; i < m.in; ++i) {
        const bool unpaired = width == lanes;
        const int64_t offset = unpaired ? tail_offset(channel - first, i, lanes) : i * width + channel - first;
        const int64_t place = first * depth + offset;
        float* vector = group + place / lanes * 9 * lanes + place % lanes;
        const float* weight = &m.weight[((g * per_group + channel) * m.in + i) * 9];
        for (int64_t tap = 0; tap < 9; ++tap) vector[tap * lanes] = weight[tap] / 9;
      }
    });
    kernels.transform_weights_f32(group, plane / lanes, packed.transformed.data() + 36 * g * plane, plane);
  }
  return packed;
}

Buffer pack_depthwise(const OpSpec& op, int64_t lanes) {
  const int64_t channels = op.weight_shape[0], area = op.kernel[0] * op.kernel[1];
  Buffer packed(area * round_up(channels, lanes));
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < area; ++tap)
      packed.data()[c / lanes * lanes * area + tap * lanes + c % lanes] = op.weight[c * area + tap];
  return packed;
}

}  // namespace fastcascade
