// The table of compute kernels: raw pointers in, raw pointers out, no checks. There is one table per instruction
// set, compiled from the same source (generic/*.inl) over that set's vector operations (isa/*.cpp).
//
// Activations are NHWC. Channels are padded up to a multiple of `lanes`; the padding holds any finite values. The
// padded number of channels is called the pitch. Instances follow each other without gaps. A block is one vector of
// output channels.
//
// Kernels split work over rows or channels, never over a sum, and never mix instances. So the bits of a result do not
// depend on the ranges that a caller chooses.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace fastcascade {

struct Range {
  int64_t begin, end;
};

// Elementwise functions that are no clamp. "gelu" is the exact one, by erf.
enum class Function {
  none,
  leaky_relu,
  elu,
  sigmoid,
  hard_sigmoid,
  silu,
  hard_swish,
  gelu,
  gelu_tanh,
  mish,
  tanh,
  exp,
  sqrt,
  reciprocal,
  count
};

// An activation is a clamp, a function, or neither. NaN passes through both.
struct Activation {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  Function function = Function::none;
  float parameter = 0.f;  // the slope of leaky_relu, the alpha of elu

  bool is_clamp() const {
    return low != -std::numeric_limits<float>::infinity() || high != std::numeric_limits<float>::infinity();
  }
  bool is_function() const { return function != Function::none; }
};

// What follows a convolution's sum: y = activation(sum + bias + residual), or activation(sum + bias) + residual.
// Residuals have the output's layout or are null; at most one is set. generic/epilogue.inl says how kernels apply it.
struct Epilogue {
  const float* bias;  // [blocks * lanes]
  Activation activation;
  bool residual_after_activation;
  const float* residual;
  const float* residual_after_function;  // in place of `residual` where the activation before it is a function
};

struct ConvGeometry {
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int64_t in_height, in_width, in_pitch, height, width, pitch;
};

// A tap of a direct convolution: its row and column in the kernel, and where its input lies from the first tap's.
struct Tap {
  int64_t offset, y, x;
};

// Direct convolution. Each tap takes `depth` consecutive terms of the input: the channels of a group, or, where
// columns are joined, those of all pixels under a row of the kernel. A term is a float; in bf16 it is a pair (bf16.h),
// and the input's pitch and a group's channels are counted in pairs. A 1×1 convolution without stride and a linear
// layer have maps of one column, so that all pixels of an image are a constant step apart.
struct DirectConv {
  const float* input;
  float* output;
  const float* weights;  // see pack_direct
  const Tap* taps;
  int64_t tap_count, depth;
  bool joins_columns;
  ConvGeometry geometry;
  int64_t blocks_per_group, group_channels;  // each group of blocks reads its own slice of the input channels
  Epilogue epilogue;
};

// 3×3 convolution with stride 1 as Winograd F(4×4, 3×3): 36 products for 16 outputs instead of 144.
struct Winograd {
  const float* input;
  float* output;
  const float* weights;                // transformed; see pack_winograd
  const float* untransformed_weights;  // null unless it pays to transform them on every call
  const float* zeros;                  // in_width * in_pitch zeros: the row above and below the image
  float* scratch;                      // winograd_scratch() floats
  bool pools;                          // the output is the 2×2 maxima of the sums, with their epilogue
  int64_t in_height, in_width, in_pitch;
  int64_t height, width;  // of the sums
  int64_t out_height, out_width, pitch;
  int64_t channels;                     // inputs of a group
  int64_t group_in_pitch, group_pitch;  // inputs and outputs of a group, rounded up to vectors
  int64_t pad_top, pad_left;
  int64_t tiles_per_pass;  // tiles that are transformed and multiplied together
  Epilogue epilogue;
};

// Depthwise convolution; weights are [block][ky][kx][lanes].
struct DepthwiseConv {
  const float* input;
  float* output;
  const float* weights;
  ConvGeometry geometry;
  Epilogue epilogue;
};

// The windows of a pool along one axis.
struct PoolAxis {
  int64_t in, count;       // pixels of the input, windows
  int64_t kernel, stride;  // adaptive where kernel is 0: window i spans ⌊i · in / count⌋ … ⌈(i + 1) · in / count⌉
  int64_t pad_before, pad_after;
};

struct Pool {
  const float* input;
  float* output;
  bool is_max, include_padding;
  PoolAxis rows, columns;
  int64_t pitch;
};

// An operand that may broadcast. Its steps are 0 along axes of size 1.
struct Operand {
  const float* data;
  int64_t image_step, row_step, pixel_step;
  bool one_channel;  // which counts for all
};

enum class Combine { none, add, multiply, scale_shift };

// y = activation(a), activation(a + b), activation(a * b) or activation(a * b + shift), where `shift` is laid out as b.
// The output may take the place of an operand that does not broadcast.
struct Elementwise {
  Combine combine;
  Operand a, b;
  const float* shift;
  float* output;
  int64_t height, width, channels, pitch;  // of the output
  Activation activation;
};

// Layer norm, softmax, mean or maximum over the channels of each pixel.
struct ChannelOp {
  const float* input;
  float* output;
  int64_t channels, in_pitch, pitch;
  const float *scale, *shift;  // [pitch], of a layer norm
  float eps;
  int64_t parts;  // runs of channels that a softmax compares: channel c competes with c ± i · channels / parts
  bool is_max;    // of a reduction
};

// A source line of an output line along one axis, and its weight in the sum.
struct WeightedLine {
  int64_t line;
  float weight;
};

// Resampling: every output line is a weighted sum of `taps` source lines.
struct ResizeAxis {
  const WeightedLine* lines;  // [output line][tap]
  int64_t taps;
};

struct Resize {
  const float* input;
  float* output;
  ResizeAxis rows, columns;
  int64_t in_height, in_width, height, width, pitch;
};

struct KernelTable {
  const char* isa;
  int lanes;      // floats in a vector
  int mr;         // tiles of Winograd's register tile
  int nr_blocks;  // its blocks; nr = nr_blocks * lanes
  // `rows` counts output rows over all instances, `panels` the panels of all groups.
  void (*conv_direct_f32)(const DirectConv&, Range rows, Range panels);
  void (*conv3x3_winograd_f32)(const Winograd&, Range tiles, Range panels);  // of nr_blocks blocks of a group
  // `vectors` of 3×3 weights as pack_winograd leaves them, [vector][9][lanes], to u[36][plane].
  void (*transform_weights_f32)(const float* weights, int64_t vectors, float* u, int64_t plane);
  void (*conv_depthwise_f32)(const DepthwiseConv&, Range rows, Range blocks);
  void (*pool_f32)(const Pool&, Range pixels, Range blocks);
  void (*elementwise_f32)(const Elementwise&, Range pixels);
  void (*layer_norm_f32)(const ChannelOp&, Range pixels);
  void (*softmax_f32)(const ChannelOp&, Range pixels);
  void (*channel_reduce_f32)(const ChannelOp&, Range pixels);
  void (*resize_f32)(const Resize&, Range pixels);

  int nr() const { return nr_blocks * lanes; }
};

// The direct kernel's blocks of a group make up panels of three, and of two at the end rather than of a single one.
constexpr int64_t kPanelBlocks = 3;
inline int64_t panel_count(int64_t blocks) { return (blocks + kPanelBlocks - 1) / kPanelBlocks; }
// The first block of a panel; of the panel behind the last, the number of blocks.
inline int64_t panel_begin(int64_t blocks, int64_t panel) {
  const int64_t threes = blocks > 1 && blocks % 3 == 1 ? blocks / 3 - 1 : blocks / 3;
  return std::min(blocks, panel <= threes ? 3 * panel : 3 * threes + 2 * (panel - threes));
}

// A sum of more terms is added up in parts of this many, so that its rounding error grows with the root of the
// number of parts, not of terms. The parts of a sum depend on the layer's shape alone. (GEMM libraries call it kc.)
constexpr int64_t kKc = 64;

// Terms of a Winograd product: the channels rounded up to even, because an unpaired tail block takes two at a time.
inline int64_t winograd_depth(int64_t channels) { return (channels + 1) / 2 * 2; }

// Floats of scratch that the Winograd kernel needs. A slot holds one of the 36 transformed inputs or products of a
// pass. Products overwrite inputs one slot behind, unless weights are transformed on the call: then products have
// slots of their own, followed by 36 planes for the weights of kKc terms. Slots and planes are one cache line longer
// than what they hold, so that they do not map to the same cache sets.
inline int64_t winograd_slot(const Winograd& c) {
  return c.tiles_per_pass * std::max(c.group_in_pitch, c.group_pitch) + 16;
}
inline int64_t winograd_plane(int64_t nr) { return kKc * nr + 16; }
inline int64_t winograd_scratch(const Winograd& c, const KernelTable& kernels) {
  const int64_t slot = winograd_slot(c);
  return c.untransformed_weights ? 73 * slot + 36 * winograd_plane(kernels.nr()) : 37 * slot;
}

// One entry per instruction set that this build knows, best first.
struct Isa {
  const char* name;
  const KernelTable* table;  // null where the build has no such kernels (another architecture)
  bool (*supported)();
  const char* needs;
};
const std::vector<Isa>& isas();

// The table forced by `name`, else by FASTCASCADE_ISA, else the best one. Throws std::invalid_argument where a forced
// set is unknown or cannot run here; a forced set is never replaced by another.
const KernelTable& choose_isa(const std::string& name = "");

}  // namespace fastcascade
