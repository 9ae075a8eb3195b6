// What the resident kernel reads: the table of layers, the exits, the arguments of a launch. resident_table.py and
// resident.py write them; their structs have the same fields in the same order.
#pragma once

#include "exit_head.cuh"

namespace fastcascade {

constexpr int kBlockWarps = FC_WARPS;
constexpr int kBlockThreads = kBlockWarps * kWarp;
constexpr int kMostWarps = 8;
constexpr int kMostImages = 4;  // of a group

enum LayerFlags {
  kClearBorder = 1,    // the output's border is not zero yet
  kResidualFirst = 2,  // activation(convolution + residual)
  kResidualLast = 4,   // activation(convolution) + residual
  kAverage = 8,        // pooling
  kCountPadding = 16,  // in the divisor of an average
  kMirror = 32,        // image: columns from right to left
};

// An entry of the table. Source, output and residual are byte offsets into shared memory. A step leads from the map of
// one image of a group to the map of the next; 0 if the images take turns in one map.
struct ResidentLayer {
  int type;        // index into FC_LAYERS; of the last entry of a stage, into FC_HEADS
  int group_type;  // the same layer for a whole group of images
  int source;
  int output;  // of a head: its scratch memory
  int residual;
  int source_step;
  int output_step;
  int residual_step;
  int flags;
  int vector;     // into `vectors`: biases; of a head: biases, then a row of classes per channel
  int window[2];  // of a pooling, one byte each: kernel height and width, strides; padding top, bottom, left, right
  int weights[kMostWarps];  // into `weights`: where each warp's first fragments are
};

// The entries of one stage. Layers from `deep` on run once for a whole group of images, if the group is full.
struct ResidentStage {
  int first;
  int deep;  // the head if a group is one image
  int head;
  int images;  // of a full group
};

struct ResidentExit {
  MlpWeights mlp;
  int selector;
  int hidden;
  float stage_weight;
  int unused;
};

struct ResidentCascade {
  const ResidentLayer* layers;
  const ResidentStage* stages;
  const Quad* weights;
  const float* vectors;
  const ResidentExit* exits;
  const void* images;       // (count, channels, height, width), bytes or float32, any strides
  const Half* pixel_table;  // (channels, 256), the value of each byte; null if the images are float32
  const float* thresholds;
  ExitTables tables;
  signed char* keep;  // null where the last stage is the cascade's last: then every image stops
  int* block_counts;
  int* queue;
  long long strides[4];  // of an image, a channel, a row, a column; in elements
  int stage_count;
  int count;
  int classes;
  int taken;  // images that a block takes from the queue at once; at most the group of the first stage
};

// Control words at the start of shared memory. Each stage has a list of the images that wait for it; its length is
// word kLists + stage * kListWords.
constexpr int kStageWord = 0, kPresentWord = 1, kStopWord = 2, kImageWords = 4;
constexpr int kLists = 8, kListWords = 8;
static_assert(kImageWords + kMostImages <= kLists, "a group's images fit before the lists");
static_assert(kListWords >= 2 * kMostImages, "a list holds one image less than a group, and the survivors of another");

}  // namespace fastcascade
