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

// Where a matrix product finds the terms under its output pixels.
enum class Int8Terms {
  in_place,  // in the input: 1×1 without stride and padding
  gathered,  // in a row for each pixel, copied from the input
  padded     // in copies of the input's rows with their padding, where the terms of neighbours overlap
};

// Convolution as a matrix product: the terms under a chunk of output pixels are prepared and multiplied with panels of
// weights. Or by Winograd, with rows of `tap_terms`.
struct Int8Conv {
  const uint8_t* input;
  void* output;
  const void* weights;     // see pack_int8; of Winograd, transformed
  const uint8_t* padding;  // a pixel of zero points, for Winograd
  void* scratch;           // int8_scratch_bytes() or int8_winograd_scratch_bytes()
  ConvGeometry geometry;
  int64_t blocks_per_group;  // of a position's output channels
  int64_t group_channels;
  int64_t tap_terms;  // group_channels, rounded up to the terms of a dot product; the weights of the rest are zero
  uint8_t zero_point;
  Int8Epilogue epilogue;
  // Of a matrix product. A position is `joined` neighbouring pixels of an output row, whose channels follow each other
  // as those of a single pixel would. A run is terms that follow each other: those of a tap, of a row, or all.
  Int8Terms terms;
  int64_t joined;
  const int64_t* runs;  // where each starts, from the first
  int64_t run_count;
  int64_t run_terms;       // with weights; those that round up have weights of zero, and multiply whatever follows
  int64_t position_terms;  // from the terms of a position to those of the next
  int64_t row_pixels;      // of a padded row
  int64_t chunk_items;     // output pixels, or output rows where padded

  int64_t depth() const { return run_count * run_terms; }
  int64_t position_pitch() const { return joined * geometry.pitch; }
  int64_t row_positions() const { return geometry.width / joined; }
  bool has_stride() const { return geometry.stride_h * geometry.stride_w > 1; }
};

// Depthwise convolution; weights are [block][ky][kx][lanes].
struct Int8Depthwise {
  const uint8_t* input;
  void* output;
  const int32_t* weights;
  const uint8_t* padding;   // a row of the input, of zero points
  const uint8_t** scratch;  // kernel_h * kernel_w
  ConvGeometry geometry;
  Int8Epilogue epilogue;
};

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
  int rows;         // pixels of the largest tile
  int least_rows;   // that a tile reads: fewer pixels have terms behind them that may be read
  int run_unit;     // terms that a run is rounded up to
  int chunk_terms;  // that stay in the second-level cache, at most
  // `items` counts output pixels over all instances, or output rows where terms are padded; `panels` pairs of blocks
  // over all groups.
  void (*conv)(const Int8Conv&, Range items, Range panels);
  void (*conv3x3_winograd)(const Int8Conv&, Range tiles, Range panels);  // null where it would be no faster
  void (*depthwise)(const Int8Depthwise&, Range pixels);
  void (*pool_max)(const Int8Pool&, Range pixels);
  // Sets invalid[instance] where a value is not finite.
  void (*quantize)(const ByteGrid&, const float* x, uint8_t* y, int32_t* invalid, Range pixels);
  void (*dequantize)(const ByteGrid&, const uint8_t* x, float* y, Range pixels);
};

constexpr int64_t kInt8PanelBlocks = 2;
inline int64_t int8_panels(int64_t blocks) { return (blocks + kInt8PanelBlocks - 1) / kInt8PanelBlocks; }

// Pieces of a chunk whose terms are a constant step apart, at most.
constexpr int64_t kInt8Strips = 18;
int64_t int8_chunk_items(const Int8Conv& c, const Int8Kernels& kernels);
int64_t int8_scratch_bytes(const Int8Conv& c, const Int8Kernels& kernels);

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
