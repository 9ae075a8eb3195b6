// Weights rearranged for the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "network.h"

namespace fastcascade {

// A convolution's weights as a dense convolution in `groups` groups, (out, in / groups, kh, kw), where each
// group's outputs fill whole vectors: neighbouring groups are merged, with zeros between them.
struct DenseWeights {
  std::vector<float> weight;
  int64_t groups, out, in, kh, kw;  // `in` per group
};
DenseWeights merge_groups(const OpSpec& op, int64_t lanes);

// [block pair][tap][depth][pair's lanes]. The order is (ky, kx, channel), whether a tap is a pixel or a row of them.
Buffer pack_direct(const DenseWeights& dense, const KernelTable& kernels);

// Weights of a Winograd convolution as vectors of output channels: [block pair][depth][2] of them, zero where depth
// exceeds `in`. A block without a partner is [depth / 2][2] instead: the first vector holds channels 0 and 1 of
// every four, the second 2 and 3, each with two terms side by side, which leaves sums that add_neighbours puts into
// order. `plain` is [vector][9][lanes], each weight divided by 9 so that no coefficient of its transform is rounded;
// `transformed` is [36][vector][lanes].
struct WinogradWeights {
  Buffer plain, transformed;
};
WinogradWeights pack_winograd(const DenseWeights& dense, const KernelTable& kernels);

// [tap][channels rounded up]
Buffer pack_depthwise(const OpSpec& op, int64_t pitch);

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace fastcascade
