// The table of compute kernels: raw pointers in, raw pointers out, no checks. One table per instruction set,
// filled from the same source (generic/*.inl) over that set's vector operations (isa/*.cpp).
//
// Activations are stored pixel by pixel, channels innermost (NHWC). Channels are padded with anything finite
// up to a multiple of `lanes`; the padded width is called the pitch. Instances follow each other without gaps.
// No kernel lets one instance's values reach another's, and no sum is ever split, so the bits of a result do
// not depend on which ranges a caller chooses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastcascade {

struct Range {
  int64_t begin, end;
};

// What follows a convolution's sum: y = clamp(sum + bias + residual), or clamp(sum + bias) + residual.
// NaN passes through the clamp. `residual` has the output's layout or is null.
struct Epilogue {
  const float* bias;  // [blocks * lanes]
  const float* residual;
  float low, high;
  bool residual_after_clamp;
};

// Direct convolution of an input that already carries its padding. An output pixel is the sum over `taps` of
// `depth` consecutive input floats, starting at tap_offsets[t] from the pixel's origin, each times one row of
// weights [lanes * blocks]. A 1×1 convolution and a linear layer are the case of one tap.
struct DirectConv {
  const float* input;
  float* output;
  const float* weights;  // [block pair][tap][depth][pair's lanes]; see pack_direct
  const int64_t* tap_offsets;
  int64_t taps, depth;
  int64_t image_step, row_step, pixel_step;  // floats between the origins of neighbouring output pixels
  int64_t height, width, pitch;              // of the output
  int64_t blocks_per_group, group_channels;  // each run of blocks reads its own slice of the input channels
  Epilogue epilogue;
};

// 3×3 convolution with stride 1 as Winograd F(4×4, 3×3): 36 products for 16 outputs instead of 144.
struct Winograd {
  const float* input;
  float* output;
  const float* weights;  // transformed; see pack_winograd
  const float* plain;    // before the transform, or null where to keep them does not pay
  const float* zeros;    // at least in_width * in_pitch zeros: the row above and below the image
  float* scratch;        // winograd_scratch() floats
  int64_t in_height, in_width, in_pitch, channels;
  int64_t height, width, pitch;  // of the output
  int64_t pad_top, pad_left;
  int64_t tiles_at_once;  // tiles that are transformed and multiplied together
  Epilogue epilogue;
};

// Depthwise convolution of an input that already carries its padding; weights are [tap][pitch].
struct DepthwiseConv {
  const float* input;
  float* output;
  const float* weights;
  const int64_t* tap_offsets;
  int64_t taps;
  int64_t image_step, row_step, pixel_step;
  int64_t height, width, pitch;
  Epilogue epilogue;
};

struct Pool {
  const float* input;
  float* output;
  bool is_max, include_padding;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right;
  int64_t in_height, in_width, height, width, pitch;
};

// y = clamp(x * scale[c] + shift[c]), or clamp(x + other) where `other` is not null.
struct Elementwise {
  const float* input;
  const float* other;
  const float* scale;
  const float* shift;
  float* output;
  int64_t pitch;
  float low, high;
};

struct KernelTable {
  const char* isa;
  int lanes;      // floats in a vector
  int tile_rows;  // rows (pixels or Winograd tiles) that the product kernels keep in registers
  int pair;       // vectors of output channels that go together in packed weights
  // `pixels` counts output pixels over all instances, `blocks` vectors of output channels (begin even to `pair`).
  void (*conv_direct_f32)(const DirectConv&, Range pixels, Range blocks);
  void (*conv3x3_winograd_f32)(const Winograd&, Range tiles, Range blocks);
  // Vectors of 3×3 weights as pack_winograd leaves them, [vector][9][lanes], to u[36][plane].
  void (*transform_weights_f32)(const float* plain, int64_t vectors, float* u, int64_t plane);
  void (*conv_depthwise_f32)(const DepthwiseConv&, Range pixels);
  void (*pool_f32)(const Pool&, Range pixels);
  void (*elementwise_f32)(const Elementwise&, Range pixels);
};

// A longer sum is added up in parts of this many terms, so that its rounding error grows with the root of the
// number of parts and not of terms. The parts of a sum depend on the layer's shape alone.
constexpr int64_t kPartialSum = 64;

// Terms of a product: the channels, of which a lone block takes two at a time. What one more reads is finite.
inline int64_t winograd_depth(int64_t channels) { return (channels + 1) / 2 * 2; }

// Floats of scratch that the Winograd kernel needs. Products take the place of spent inputs, one slot ahead; with
// plain weights they have slots of their own, and 36 planes of the weights of a partial sum follow. Slots and planes
// are a cache line longer than what they hold, so that they do not fall on the same cache sets.
inline int64_t winograd_slot(const Winograd& c) {
  return c.tiles_at_once * (c.in_pitch > c.pitch ? c.in_pitch : c.pitch) + 16;
}
inline int64_t winograd_plane(int64_t pair_lanes) { return kPartialSum * pair_lanes + 16; }
inline int64_t winograd_scratch(const Winograd& c, const KernelTable& kernels) {
  return c.plain ? 73 * winograd_slot(c) + 36 * winograd_plane(kernels.pair * kernels.lanes) : 37 * winograd_slot(c);
}

// One entry per instruction set that this build knows, best first.
struct Isa {
  const char* name;
  const KernelTable* table;  // null where the build has no such kernels (another architecture)
  bool (*supported)();
  const char* needs;
};
const std::vector<Isa>& isas();

// The table forced by FASTCASCADE_ISA or by `name`, or else the best one. Throws std::invalid_argument with
// the reason where a forced set is unknown or cannot run here; it is never replaced by another.
const KernelTable& choose_isa(const std::string& name = "");

}  // namespace fastcascade
