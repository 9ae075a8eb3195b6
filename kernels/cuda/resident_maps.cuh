// Activations in shared memory, and how warps divide a layer's result among themselves.
//
// An activation is fp16, [channel / 8][row][column][channel % 8] inside a border of zeros. A pixel of 8 channels is
// 16 bytes, so 8 pixels of a row are 128 bytes: one phase of ldmatrix, all 32 banks, wherever they begin. Rows are
// width + 1 pixels apart: the border right of a row is the border left of the next one. The maps of a group of images
// follow one another, so that they are one map of as many times the channels.
#pragma once

#include "resident_table.cuh"

namespace fastcascade {

template <int kChannelCount, int kMapHeight, int kMapWidth>
struct Map {
  static constexpr int kChannels = kChannelCount, kHeight = kMapHeight, kWidth = kMapWidth;
  static constexpr int kPitch = (kWidth + 1) * 16;            // bytes from a row to the next
  static constexpr int kPlane = (kHeight + 2) * kPitch + 16;  // bytes from 8 channels to the next 8
  static constexpr int kBytes = kPlane * (kChannels / 8);     // of an image
  // Byte offset of a pixel; −1 and kHeight, kWidth are the border.
  static constexpr FC_FUNCTION int at(int row, int column) { return (row + 1) * kPitch + (column + 1) * 16; }
};

// The border of kImages maps.
template <class M, int kImages, class Context>
FC_FUNCTION void clear_border(Context& context, int offset) {
  constexpr int kAcross = M::kWidth + 1, kBorder = 2 * kAcross + 1 + M::kHeight;
#pragma unroll 1
  for (int i = context.thread(); i < kBorder * (M::kChannels / 8) * kImages; i += kBlockThreads) {
    const int k = i % kBorder;
    const int pixel = k < kAcross           ? k                                         // row −1
                      : k < 2 * kAcross + 1 ? (M::kHeight + 1) * kAcross + k - kAcross  // row kHeight, and one more
                                            : (k - 2 * kAcross) * kAcross;              // left of each row
    context.store128(offset + i / kBorder * M::kPlane + pixel * 16, Quad{{0, 0, 0, 0}});
  }
  context.converge();  // lanes leave the loop at different times; ldmatrix and mma need all of them
}

// A tile is 16 pixels × 16 channels of the result, the M and N of two mma.m16n8k16: kColumns columns × kBands rows,
// kTiles rows apart, so that tile t + 1 lies one row below tile t. A unit is what a warp computes at once: kTiles tiles
// for kGroups groups of 16 channels.
//   kHeight, kWidth: of the result before pooling.
template <int kHeight, int kWidth, int kOutChannels, int kTileCount, int kGroupCount>
struct Tiling {
  static constexpr int kTiles = kTileCount, kGroups = kGroupCount;
  static constexpr int kColumns = kWidth > 4 ? 8 : 4;
  static constexpr int kBands = 16 / kColumns;  // rows of a tile
  static constexpr int kPassRows = kBands * kTiles;
  static constexpr int kPasses = (kHeight + kPassRows - 1) / kPassRows;
  static constexpr int kColumnBlocks = (kWidth + kColumns - 1) / kColumns;
  static constexpr int kUnits = kColumnBlocks * kPasses * (kOutChannels / 16 / kGroups);
  static_assert(kOutChannels % (16 * kGroups) == 0 && kTiles * kGroups <= 8, "64 registers of sums an image");

  int row, column, group;  // of the unit's first pixel; group of 8 channels

  FC_FUNCTION explicit Tiling(int unit)
      : row(unit / kColumnBlocks % kPasses * kPassRows),
        column(unit % kColumnBlocks * kColumns),
        group(unit / (kColumnBlocks * kPasses) * kGroups * 2) {}

  // The 16 rows of an A fragment: rows of lane and column within a tile, as ldmatrix wants them.
  FC_FUNCTION int source_row(int lane) const { return row + (lane & 15) / kColumns * kTiles; }
  FC_FUNCTION int source_column(int lane) const { return column + (lane & 15) % kColumns; }
  // Of a result: a thread holds pixels lane / 4 and lane / 4 + 8 (`half`), 2 channels each.
  FC_FUNCTION int result_row(int lane, int tile, int half) const {
    return row + ((lane >> 2) / kColumns + half * (8 / kColumns)) * kTiles + tile;
  }
  FC_FUNCTION int result_column(int lane) const { return column + (lane >> 2) % kColumns; }
  FC_FUNCTION bool inside(int lane, int tile, int half) const {
    return (kHeight % kPassRows == 0 || result_row(lane, tile, half) < kHeight) &&
           (kWidth % kColumns == 0 || result_column(lane) < kWidth);
  }
};

}  // namespace fastcascade
