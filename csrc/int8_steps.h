// Steps on bytes: packing their weights, and running them.
#pragma once

#include "network.h"
#include "run_step.h"

namespace fastcascade {

// The kernel of an int8_conv2d or int8_linear. Pitches are multiples of `pitch_lanes`.
StepKind int8_step_kind(const OpSpec& op, const Shape& in, const Int8Kernels& kernels, int64_t pitch_lanes);

// Packs the constants of an int8_conv2d or int8_linear into `step`, whose kind is set, and fills in its arguments.
void pack_int8_layer(Step& step, const OpSpec& op, const Value& in, const Value& out, int64_t pitch_lanes,
                     const Int8Kernels& kernels);

// Arguments of a maximum over bytes.
Int8Pool int8_pool_arguments(const OpSpec& op, const Value& in, const Value& out);

// Where a step reads and writes. Bytes lie at the addresses of float32 values; flags are those of the first instance.
struct StepPlaces {
  const float* input;
  const float* residual;
  float* output;
  float* scratch;
  int32_t* invalid;
};

// Runs the part of a step on bytes that covers these output pixels, or rows, or Winograd tiles, over all instances, and
// panels of channels.
void run_int8_step(const Network& net, const Step& step, const StepPlaces& at, Range positions, Range panels);

}  // namespace fastcascade
