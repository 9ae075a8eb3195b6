// A stage ready to run: steps in execution order, each with its kernel and packed weights, and values placed in one
// arena per thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bf16.h"
#include "int8.h"
#include "kernels.h"
#include "memory.h"
#include "stage_spec.h"

namespace fastcascade {

// Where a value lives. A value that a later segment reads has room for the whole tile of instances, others for one
// sub-tile of their segment.
struct Value {
  Shape shape;
  int64_t pitch = 0;   // channels as stored; of a value in bf16, pairs of them
  int64_t floats = 0;  // per instance; four bytes to a float
  bool bytes = false;  // quantised
  bool holds_tile = false;
  int64_t offset = 0;  // in the arena

  void set_pitch(int64_t channels) {
    pitch = channels;
    floats = shape.h * shape.w * channels / (bytes ? 4 : 1);
  }
};

enum class StepKind {
  load,
  direct,
  direct_bf16,
  round_bf16,
  winograd,
  depthwise,
  pool,
  elementwise,
  layer_norm,
  softmax,
  channel_reduce,
  resize,
  reorder,
  reshape,
  pad,
  slice,
  concat,
  flatten,
  quantize,
  dequantize,
  int8_conv,
  int8_winograd,
  int8_depthwise,
  int8_pool
};

// Arguments of a step on bytes; see int8.h. The step's weights hold the packed weights.
struct Int8Step {
  Int8Conv conv{};
  Int8Depthwise depthwise{};
  Int8Pool pool{};
  ByteGrid grid{};
  std::vector<int32_t> start;
  std::vector<float> multiplier;
  std::vector<uint8_t> padding;
  std::vector<int64_t> runs;
  int64_t scratch_floats = 0;
};

struct Step {
  StepKind kind;
  std::vector<int64_t> inputs;
  int64_t output = 0, residual = -1;
  std::string operation, kernel;  // for describe()
  int64_t macs = 0;               // per instance, as the plan counts them, whatever the kernel does
  int64_t input_floats = 0;       // per instance
  int64_t work = 0;               // per instance: macs, and reading and writing values counted as macs
  std::vector<float> bias;
  std::vector<Tap> taps;
  std::vector<WeightedLine> rows, columns;  // of a resize
  Buffer weights, untransformed_weights;    // the latter for Winograd in networks with large weights only
  int64_t work_items = 0;                   // per instance: rows, pixels, Winograd tiles, or 1
  int64_t min_items = 1;                    // that keep a thread's register tiles full
  int64_t panels = 1;                       // of output channels, that threads may divide among them
  DirectConv direct{};                      // also of direct_bf16
  Bf16Rounding rounding{};
  Winograd winograd{};
  DepthwiseConv depthwise{};
  Pool pool{};
  Elementwise elementwise{};
  ChannelOp channel_op{};
  Resize resize{};
  Int8Step int8{};
  OpSpec layout;  // of a step that only moves data

  std::vector<int64_t> reads() const {
    std::vector<int64_t> values = inputs;
    if (residual >= 0) values.push_back(residual);
    return values;
  }
};

// Steps that run sub-tile by sub-tile, so that what they exchange stays in cache.
struct Segment {
  size_t begin, end;           // steps
  int64_t sub_tile_instances;  // at most
};

struct Network {
  std::string name;
  const KernelTable* kernels;
  const Int8Kernels* int8_kernels;  // null where no value is bytes
  const Bf16Kernels* bf16_kernels;  // null where nothing is to be computed in bf16
  StageInput input_kind;
  std::vector<Value> values;
  std::vector<Step> steps;  // the first loads value 0
  std::vector<Segment> segments;
  int64_t features, logits;     // values; features is -1 where no later stage reads them
  int64_t tile_instances;       // instances that run together
  int64_t min_rows_per_thread;  // with fewer, threads share each step instead of each running its own instances
  int64_t arena_floats;         // activations of a tile
  int64_t invalid_offset = -1;  // in the arena: a flag per instance of the tile, set where a quantised value was not
                                // finite; -1 where nothing is quantised
  int64_t scratch_floats;       // of one thread
  int64_t weight_bytes;
  Buffer zeros;

  bool reads_previous() const { return input_kind == StageInput::previous; }
  const Shape& shape(int64_t value) const { return values[value].shape; }
};

// Checks a stage, chooses its kernels and packs its weights. Direct convolutions are in bf16 where its kernels are
// given. `forced` is as in choose_conv_kernel or choose_int8_kernels. Throws std::invalid_argument where the stage is
// inconsistent or too large.
Network build_network(StageSpec spec, const KernelTable& kernels, const Bf16Kernels* bf16_kernels,
                      const std::string& forced);

}  // namespace fastcascade
