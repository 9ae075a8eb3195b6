// What kernels other than convolutions are told: constants of the operation, and how its values lie in memory. Pointers
// to values are filled in by run_step.
#pragma once

#include "network.h"

namespace fastcascade {

Pool pool_arguments(const OpSpec& op, const Value& in, const Value& out);

// These pack the operation's constants into `weights`, which the arguments point to.
ChannelOp channel_arguments(const OpSpec& op, const Value& in, const Value& out, Buffer& weights);
// `other` is null where the operation has one operand.
Elementwise elementwise_arguments(const OpSpec& op, const Value& in, const Value* other, const Value& out,
                                  Buffer& weights);

}  // namespace fastcascade
