// Where a stage's input comes from.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastcascade {

// A batch of images, or of feature maps from elsewhere. Strides are in elements. `table` is [channels][256] and used
// for bytes only.
struct Images {
  const void* data;
  bool bytes;
  const float* table;
  int64_t count;
  int64_t strides[4];  // of (N, C, H, W)
};

// What a tile reads: some images of the batch, or some rows of the features that the stage before has saved.
struct Source {
  const Images* images = nullptr;
  const float* features = nullptr;  // [slot][feature_floats], as the arena stores them; null where images are read
  int64_t feature_floats = 0;
  const int64_t* index = nullptr;  // of an image or a slot, one per instance of the tile
};

}  // namespace fastcascade
