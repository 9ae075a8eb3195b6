// Chains of convolutions that run by stripes of rows.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "network.h"
#include "step_parts.h"

namespace fastcascade {

// The steps of a network as units, in order. Links convolutions into chains where what they exchange does not fit the
// second-level cache, and marks those values as private.
std::vector<Unit> link_chains(Network& net);

constexpr size_t kMaxChain = 3;  // steps

// Rows of a chain's last output, of one instance.
inline int64_t output_rows(const Network& net, const Unit& chain) {
  return net.shape(net.steps[chain.end - 1].output).h;
}

// What a thread has computed of a chain.
struct StripeRows {
  int64_t next = -1;         // the row behind the last stripe, counted over all instances
  int64_t end[kMaxChain]{};  // of the rows of each step's output, of its instance
};

// Divides rows of a chain's last output, counted over all instances, into stripes, and calls run(i, part) for every
// step i of each. Rows that two stripes need are computed once, also if the second begins a call, where the last call
// ended.
void run_stripes(const Network& net, const Unit& chain, Range rows, StripeRows& have,
                 const std::function<void(size_t, StepPart)>& run);

}  // namespace fastcascade
