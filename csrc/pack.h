// Weights in the order in which the kernels read them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "stage_spec.h"

namespace fastcascade {

// Weights (out, in / groups, kh, kw) of a convolution whose groups have been merged with their neighbours, with zeros
// between them, until the outputs of each group fill whole vectors.
struct MergedWeights {
  std::vector<float> weight;
  int64_t groups, out, in, kh, kw;  // `in` per group
};
MergedWeights merge_groups(const OpSpec& op, int64_t lanes);

// The fewest neighbours whose outputs fill whole vectors; all groups where that number does not divide them.
int64_t neighbours_to_merge(const OpSpec& op, int64_t lanes);

// [group][panel][tap][depth][panel's lanes]; see panel_begin. The order of terms is (ky, kx, channel), whether a tap is
// a pixel of the kernel or a row of them. A slice of a tap's terms is contiguous, as the direct kernel reads it.
Buffer pack_direct(const MergedWeights& merged, int64_t lanes);

// The same in bf16: [group][panel][tap][pairs of terms][panel's lanes][2], with a 0 where a tap's terms are odd.
Buffer pack_direct_bf16(const MergedWeights& merged, int64_t lanes);

// Weights of a Winograd convolution as vectors, group by group: [panel][depth][blocks of the panel], panels of
// nr_blocks, zero where depth exceeds `in`. An unpaired tail block is [depth / 2][2] instead: the first vector holds
// channels 0 and 1 of every four, the second 2 and 3, each with two terms side by side. pairwise_add puts the sums back
// into order.
struct WinogradWeights {
  Buffer untransformed;  // [vector][9][lanes]; each weight is divided by 9 so that the transform's factors are exact
  Buffer transformed;    // [group][36][vector][lanes]
};
WinogradWeights pack_winograd(const MergedWeights& merged, const KernelTable& kernels);

// [block][tap][lanes]
Buffer pack_depthwise(const OpSpec& op, int64_t lanes);

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace fastcascade
