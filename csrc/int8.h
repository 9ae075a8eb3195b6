// The int8 kernels: raw pointers in, raw pointers out, no checks. kernels/reference_int8.py defines their bits.
//
// A quantised value is a byte q that stands for (q - zero point) · scale, in NHWC with the same pitch in bytes as a
// float32 value has in floats. Padding holds the zero point. So a sum of products of bytes and weights is off by a
// constant of its output channel, and starts at the negative of that: the kernels know nothing of zero points. Sums are
// exact, whatever the instructions, because they fit in an int32 and intermediate sums wrap.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastcascade {

// y = clamp(sum · multiplier + bias + (residual - residual_zero_point) · residual_scale, low, high). Bytes are
// round(y), with halves to even, plus zero_point. Every operation rounds to float32.
struct Int8Epilogue {
  const int32_t* start;            // [pitch], of the sums
  const float *multiplier, *bias;  // [pitch]
  const uint8_t* residual;         // of the output's layout, or null
  float residual_scale, residual_zero_point;
  float low, high;
  bool to_bytes;  // the output is bytes, else float32
  int32_t zero_point;
};

// Convolution as a matrix product: the bytes under a chunk of output pixels are gathered into rows of `depth` terms,
// then multiplied with panels of weights. Or by Winograd, with rows of `tap_terms`.
struct Int8Conv {
  const uint8_t* input;
  void* output;
  const void* weights;     // see pack_int8; of Winograd, transformed
  const uint8_t* padding;  // a pixel of zero points, for Winograd
  void* scratch;           // int8_scratch_bytes() or int8_winograd_scratch_bytes()
  ConvGeometry geometry;
  int64_t blocks_per_group, group_channels;
  int64_t tap_terms;  // group_channels, rounded up to the terms of a dot product; the weights of the rest are zero
  uint8_t zero_point;
  Int8Epilogue epilogue;

  int64_t depth() const { return geometry.kernel_h * geometry.kernel_w * tap_terms; }
};

// Depthwise convolution; weights are [block][ky][kx][lanes].
struct Int8Depthwise {
  const uint8_t* input;
  void* output;
  const int32_t* weights;
  const uint8_t* padding;   // a pixel of zero points
  const uint8_t** scratch;  // the pixel under each tap: kernel_h * kernel_w * kDepthwisePixels
  ConvGeometry geometry;
  Int8Epilogue epilogue;
};
constexpr int64_t kDepthwisePixels = 4;

struct Int8Pool {
  const uint8_t* input;
  uint8_t* output;
  PoolAxis rows, columns;
  int64_t pitch;
};

// Between float32 and bytes.
struct ByteGrid {
  float scale;
  int32_t zero_point;
  int64_t area, pitch;  // pixels of an instance, channels of a pixel
};

struct Int8Kernels {
  const char* isa;
  int lanes;  // output channels of a vector
  int group;  // terms that one instruction multiplies and adds up in each lane
  int term_bytes;
  int rows;  // pixels of the register tile
  // `pixels` counts output pixels over all instances, `panels` pairs of blocks over all groups.
  void (*conv)(const Int8Conv&, Range pixels, Range panels);
  void (*conv3x3_winograd)(const Int8Conv&, Range tiles, Range panels);  // null where it would be no faster
  void (*depthwise)(const Int8Depthwise&, Range pixels);
  void (*pool_max)(const Int8Pool&, Range pixels);
  // Sets invalid[instance] where a value is not finite.
  void (*quantize)(const ByteGrid&, const float* x, uint8_t* y, int32_t* invalid, Range pixels);
  void (*dequantize)(const ByteGrid&, const uint8_t* x, float* y, Range pixels);
};

constexpr int64_t kInt8PanelBlocks = 2;
inline int64_t int8_panels(int64_t blocks) { return (blocks + kInt8PanelBlocks - 1) / kInt8PanelBlocks; }

// Output pixels that are gathered at once: 32 Ki terms, which stay in the second-level cache for all panels.
inline int64_t int8_chunk_pixels(const Int8Conv& c, int64_t rows) {
  return std::max<int64_t>(1, (32 << 10) / c.depth() / rows) * rows;
}
inline int64_t int8_scratch_bytes(const Int8Conv& c, const Int8Kernels& kernels) {
  constexpr int64_t kSlack = 64;  // terms are gathered by whole vectors
  return int8_chunk_pixels(c, kernels.rows) * c.depth() * kernels.term_bytes + kSlack;
}

// Winograd's 2×2 tiles that are transformed and multiplied together. A slot holds one of their 16 transformed inputs.
// It is a cache line longer than that, so that slots do not map to the same cache sets.
constexpr int64_t kInt8WinogradTiles = 12;
inline int64_t int8_winograd_slot(const Int8Conv& c) { return kInt8WinogradTiles * c.tap_terms + 32; }
inline int64_t int8_winograd_scratch_bytes(const Int8Conv& c, const Int8Kernels& kernels) {
  const int64_t sums = kInt8WinogradTiles * kInt8PanelBlocks * kernels.lanes;
  return 16 * (int8_winograd_slot(c) * kernels.term_bytes + sums * static_cast<int64_t>(sizeof(int32_t)));
}

// Input channels up to which four times a sum of 3×3 products of bytes and weights fits in an int32.
constexpr int64_t kMaxInt8WinogradChannels = 1800;

// One entry per set of int8 kernels that this build knows, best first; fields as in Isa.
struct Int8Isa {
  const char* name;
  const Int8Kernels* kernels;
  bool (*supported)();
  const char* needs;
};
const std::vector<Int8Isa>& int8_isas();

// The prefix of the names of the int8 kernels; the instruction set follows.
constexpr const char* kInt8Prefix = "int8_";

// The best int8 kernels whose vectors divide those of the float32 kernels, or those that `forced` names, such as
// "int8_avx2". Throws std::invalid_argument where those are unknown or cannot run here.
const Int8Kernels& choose_int8_kernels(const KernelTable& kernels, const std::string& forced);

}  // namespace fastcascade
