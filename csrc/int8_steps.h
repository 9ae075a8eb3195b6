// Steps on bytes: packing their weights, and running them.
#pragma once

#include "network.h"
#include "run_step.h"

namespace fastcascade {

// True where the convolution's kernel is the depthwise one.
bool is_int8_depthwise(const OpSpec& op, const Shape& in);

// Packs the constants of an int8_conv2d or int8_linear into `step`, and fills in its arguments. Pitches are multiples
// of `pitch_lanes`.
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

// Runs the part of a step on bytes that covers these output pixels, over all instances, and panels of channels.
void run_int8_step(const Network& net, const Step& step, const StepPlaces& at, Range pixels, Range panels);

}  // namespace fastcascade
