// A whole cascade in one launch. A block takes an image from a queue, keeps its activations in shared memory, runs a
// network on it, then the exit head; where the selector says "go on", the same block runs the next network, or the
// next segment of the same one, on the activations that are still there.
// Semantics: kernels/reference.py, resident. Planning: resident.py, which writes the table of layers that drives the
// kernel and the list of layer types (FC_LAYERS, FC_HEADS) that are compiled in.
//
// Maps. An activation is fp16, [channel / 8][row][column][channel % 8] inside a border of zeros. A pixel of 8 channels
// is 16 bytes, so 8 pixels of a row are 128 bytes: one phase of ldmatrix, all 32 banks, wherever they begin. Rows are
// width + 1 pixels apart: the border right of a row is the border left of the next one.
//
// Convolution as implicit GEMM with mma.m16n8k16. M: 16 pixels, kColumns columns × 16 / kColumns rows that are kTiles
// rows apart. N: 16 output channels, kGroups times. A warp computes a unit: kTiles tiles (their rows interleave, so
// that tile t + 1 lies one row below tile t), kGroups · 16 channels, all of K. For every 16 input channels and every
// kernel column it walks down the input rows: one ldmatrix.x4 gives a row of tiles, which is the A fragment of up to
// three output tiles (one per kernel row) and all channel groups, so 6 · kGroups independent mma follow one load.
// Only the accumulators stay in registers.
//
// Bodies are templates on a context, as in context.cuh: resident.cu has the GPU's, tests/gpu/emulator the host's. On
// top of context.cuh's, a context has loads and stores of shared memory by byte offset, load_matrix, mma, pack,
// unpack, max2, and
//   converge(): __syncwarp;
//   forget(): hides from the compiler that thread() is constant. It would otherwise compute everything that derives
//   from it once, ahead of all layer types, and spill.
#pragma once

#include "exit_head.cuh"

namespace fastcascade {

constexpr int kBlockWarps = FC_WARPS;
constexpr int kBlockThreads = kBlockWarps * kWarp;
constexpr int kMostWarps = 8;

enum LayerFlags {
  kClearBorder = 1,    // the output's border is not zero yet
  kResidualFirst = 2,  // activation(convolution + residual)
  kResidualLast = 4,   // activation(convolution) + residual
  kAverage = 8,        // pooling
  kCountPadding = 16,  // in the divisor of an average
};

// An entry of the table. Places are byte offsets into shared memory.
struct ResidentLayer {
  int type;  // index into FC_LAYERS, of the last entry of a stage into FC_HEADS
  int source;
  int output;  // of a head: its scratch memory
  int residual;
  int flags;
  int vector;     // into `vectors`: biases; of a head: biases, then a row of classes per channel
  int window[2];  // of a pooling, one byte each: kernel height and width, strides; padding top, bottom, left, right
  int weights[kMostWarps];  // into `weights`: where each warp's first fragments are
};

// One exit's selector. Weights as in kernels/reference.py, MLPWeights.
struct ResidentExit {
  const float* mean;
  const float* std;
  const float* w1;
  const float* b1;
  const float* w2;
  const float* b2;
  int selector;
  int hidden;
  float stage_weight;
  int unused;
};

struct ResidentCascade {
  const ResidentLayer* layers;
  const int* begins;  // of each stage in `layers`, and the end
  const Quad* weights;
  const float* vectors;
  const ResidentExit* exits;
  const void* images;       // (count, channels, height, width), bytes or float32, any strides
  const Half* pixel_table;  // (channels, 256), the value of each byte; null if the images are float32
  const float* thresholds;
  float* log_sum;
  float* weight_sum;
  int* previous_label;
  float* log_probs;
  long long* label;
  long long* exit_stage;
  signed char* keep;  // null where the last stage is the cascade's last: then every image stops
  int* block_counts;
  int* queue;
  long long strides[4];  // of an image, a channel, a row, a column; in elements
  int stages;
  int count;
  int classes;
  int unused;
};

constexpr int kControlPlace = 0;  // 16 bytes: the block's image; whether it stopped

template <int kChannelCount, int kMapHeight, int kMapWidth>
struct Map {
  static constexpr int kChannels = kChannelCount, kHeight = kMapHeight, kWidth = kMapWidth;
  static constexpr int kPitch = (kWidth + 1) * 16;            // bytes from a row to the next
  static constexpr int kPlane = (kHeight + 2) * kPitch + 16;  // bytes from 8 channels to the next 8
  // Byte offset of a pixel; −1 and kHeight, kWidth are the border.
  static constexpr FC_FUNCTION int at(int row, int column) { return (row + 1) * kPitch + (column + 1) * 16; }
};

template <class M, class Context>
FC_FUNCTION void clear_border(Context& context, int place) {
  constexpr int kAcross = M::kWidth + 1, kBorder = 2 * kAcross + 1 + M::kHeight;
#pragma unroll 1
  for (int i = context.thread(); i < kBorder * (M::kChannels / 8); i += kBlockThreads) {
    const int k = i % kBorder;
    const int pixel = k < kAcross           ? k                                         // row −1
                      : k < 2 * kAcross + 1 ? (M::kHeight + 1) * kAcross + k - kAcross  // row kHeight, and one more
                                            : (k - 2 * kAcross) * kAcross;              // left of each row
    context.store128(place + i / kBorder * M::kPlane + pixel * 16, Quad{{0, 0, 0, 0}});
  }
  context.converge();  // lanes leave the loop at different times; ldmatrix and mma need all of them
}

// The first fragments of a layer, which are loaded while the one before ends.
constexpr int kFirst = 3;

template <class Context>
FC_FUNCTION void load_first(Context& context, Quad (&w)[kFirst], const Quad* from) {
#pragma unroll
  for (int i = 0; i < kFirst; i++) w[i] = context.load_global(from + i * kWarp);
}

// Which pixels and channels the tiles of a unit are, and what a thread holds of them.
//   Size: of the result before pooling.
template <int kHeight, int kWidth, int kOutChannels, int kTileCount, int kGroupCount>
struct Tiling {
  static constexpr int kTiles = kTileCount, kGroups = kGroupCount;
  static constexpr int kColumns = kWidth > 4 ? 8 : 4;
  static constexpr int kBands = 16 / kColumns;  // rows of a tile
  static constexpr int kPassRows = kBands * kTiles;
  static constexpr int kPasses = (kHeight + kPassRows - 1) / kPassRows;
  static constexpr int kColumnBlocks = (kWidth + kColumns - 1) / kColumns;
  static constexpr int kUnits = kColumnBlocks * kPasses * (kOutChannels / 16 / kGroups);
  static_assert(kOutChannels % (16 * kGroups) == 0 && kTiles * kGroups <= 8, "accumulators fit into 64 registers");

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

// No residual, or one of the output's shape.
struct Straight {
  static constexpr bool kStrided = false;
};

// Shortcut A: every kStep-th pixel of a map whose first channel is added to channel kBefore.
template <class M, int kRowStep, int kFirstChannel, int kRealChannels>
struct Strided {
  static constexpr bool kStrided = true;
  using Source = M;
  static constexpr int kStep = kRowStep, kBefore = kFirstChannel, kChannels = kRealChannels;
  static_assert(kBefore % 2 == 0 && kChannels % 2 == 0, "a thread's two channels are read as one word");
};

template <class M, class View, class T, class Context>
FC_FUNCTION void add_residual(Context& context, const T& tiling, int place, int tile, int n, int half,
                              float (&sum)[4]) {
  const int lane = context.lane();
  if (!tiling.inside(lane, tile, half)) return;
  const int y = tiling.result_row(lane, tile, half), x = tiling.result_column(lane);
  int at;
  if constexpr (View::kStrided) {
    const int channel = (tiling.group + n) * 8 + (lane & 3) * 2 - View::kBefore;
    if (channel < 0 || channel >= View::kChannels) return;
    using S = typename View::Source;
    at = channel / 8 * S::kPlane + S::at(y * View::kStep, x * View::kStep) + channel % 8 * 2;
  } else {
    at = (tiling.group + n) * M::kPlane + M::at(y, x) + (lane & 3) * 4;
  }
  float low, high;
  context.unpack(context.load32(place + at), low, high);
  sum[half * 2] += low;
  sum[half * 2 + 1] += high;
}

template <class M, class View, class T, class Context>
FC_FUNCTION void begin_tiles(Context& context, const T& tiling, const ResidentLayer& layer, const float* bias,
                             float (&sum)[T::kTiles][2 * T::kGroups][4]) {
  const float* const from = bias + tiling.group * 8 + (context.lane() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 2 * T::kGroups; n++) {
    const float low = from[n * 8], high = from[n * 8 + 1];
#pragma unroll
    for (int t = 0; t < T::kTiles; t++) sum[t][n][0] = sum[t][n][2] = low, sum[t][n][1] = sum[t][n][3] = high;
  }
  if (layer.flags & kResidualFirst) {
#pragma unroll
    for (int t = 0; t < T::kTiles; t++)
#pragma unroll
      for (int n = 0; n < 2 * T::kGroups; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          add_residual<M, View>(context, tiling, layer.residual, t, n, half, sum[t][n]);
  }
  context.converge();  // lanes outside the map read nothing; ldmatrix and mma need all of them
}

template <class M, bool kRelu, class T, class Context>
FC_FUNCTION void store_tiles(Context& context, const T& tiling, const ResidentLayer& layer,
                             float (&sum)[T::kTiles][2 * T::kGroups][4]) {
  const int lane = context.lane();
  const int place = layer.output + tiling.group * M::kPlane + (lane & 3) * 4;
  if (layer.flags & kResidualLast) {
#pragma unroll
    for (int t = 0; t < T::kTiles; t++)
#pragma unroll
      for (int n = 0; n < 2 * T::kGroups; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (kRelu) sum[t][n][i] = sum[t][n][i] < 0 ? 0.0f : sum[t][n][i];  // keeps NaN
#pragma unroll
        for (int half = 0; half < 2; half++) {
          add_residual<M, Straight>(context, tiling, layer.residual, t, n, half, sum[t][n]);
          if (tiling.inside(lane, t, half))
            context.store32(place + n * M::kPlane + M::at(tiling.result_row(lane, t, half), tiling.result_column(lane)),
                            context.template pack<false>(sum[t][n][half * 2], sum[t][n][half * 2 + 1]));
        }
      }
    return;
  }
#pragma unroll
  for (int t = 0; t < T::kTiles; t++)
#pragma unroll
    for (int n = 0; n < 2 * T::kGroups; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (tiling.inside(lane, t, half))
          context.store32(place + n * M::kPlane + M::at(tiling.result_row(lane, t, half), tiling.result_column(lane)),
                          context.template pack<kRelu>(sum[t][n][half * 2], sum[t][n][half * 2 + 1]));
}

// 2×2 maximum of the result. A thread holds both rows of a window; its neighbour (lane ^ 4) holds the other column.
// Each of the two finishes one of their two groups of 8 channels.
template <class M, bool kRelu, class T, class Context>
FC_FUNCTION void store_pooled(Context& context, const T& tiling, const ResidentLayer& layer,
                              float (&sum)[T::kTiles][2 * T::kGroups][4]) {
  static_assert(T::kTiles % 2 == 0, "both rows of a window are in one thread");
  const int lane = context.lane(), odd = lane >> 2 & 1;
  const int x = tiling.result_column(lane) / 2;
  const int place = layer.output + (tiling.group + odd) * M::kPlane + (lane & 3) * 4;
#pragma unroll
  for (int t = 0; t < T::kTiles; t += 2)
#pragma unroll
    for (int g = 0; g < T::kGroups; g++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        unsigned int best[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const float (&upper)[4] = sum[t][g * 2 + n];
          const float (&lower)[4] = sum[t + 1][g * 2 + n];
          best[n] = context.max2(context.template pack<kRelu>(upper[half * 2], upper[half * 2 + 1]),
                                 context.template pack<kRelu>(lower[half * 2], lower[half * 2 + 1]));
        }
        const unsigned int other = context.shuffle_xor(odd ? best[0] : best[1], 4);
        const unsigned int value = context.max2(odd ? best[1] : best[0], other);
        const int y = tiling.result_row(lane, t, half) / 2;
        if (y < M::kHeight && x < M::kWidth) context.store32(place + g * 2 * M::kPlane + M::at(y, x), value);
      }
}

// Channels n·8 … n·8 + 15 of a tile.
template <class Context>
FC_FUNCTION void multiply(Context& context, float (&low)[4], float (&high)[4], const unsigned int (&a)[4],
                          const Quad& w) {
  context.mma(low, a, w.word[0], w.word[1]);
  context.mma(high, a, w.word[2], w.word[3]);
}

// One kernel column, 16 input channels: down the input rows.
template <class In, int kKernel, int kStride, class T, class Context>
FC_FUNCTION void add_column(Context& context, float (&sum)[T::kTiles][2 * T::kGroups][4], int source,
                            const Quad (&w)[kKernel * T::kGroups]) {
#pragma unroll
  for (int r = 0; r < (T::kTiles - 1) * kStride + kKernel; r++) {
    if (kKernel < kStride && r % kStride >= kKernel) continue;  // a row that no tile reads
    unsigned int a[4];
    context.load_matrix(a, source + r * In::kPitch);
#pragma unroll
    for (int ky = 0; ky < kKernel; ky++) {
      const int tile = (r - ky) / kStride;
      if (r >= ky && (r - ky) % kStride == 0 && tile < T::kTiles) {
#pragma unroll
        for (int g = 0; g < T::kGroups; g++)
          multiply(context, sum[tile][g * 2], sum[tile][g * 2 + 1], a, w[ky * T::kGroups + g]);
      }
    }
  }
}

// A convolution of a map; kHeight, kWidth: of its result, before pooling. `w` comes with this layer's first fragments
// and leaves with the next one's, from `next`.
template <class In, class Out, int kHeight, int kWidth, int kKernel, int kStride, int kTop, int kLeft, int kTiles,
          int kGroups, bool kRelu, bool kPooled, class View>
struct Conv {
  using T = Tiling<kHeight, kWidth, Out::kChannels, kTiles, kGroups>;
  static constexpr int kBatch = kKernel * kGroups;  // fragments of a step: a kernel column, 16 input channels
  static constexpr int kSteps = In::kChannels / 16 * kKernel;
  static constexpr int kStream = kSteps * kBatch * kWarp;  // of a unit, in 16-byte words

  template <class Context>
  static FC_FUNCTION void run(Context& context, const ResidentLayer& layer, const ResidentCascade& net,
                              Quad (&w)[kFirst], const Quad* next, int) {
    const int lane = context.lane(), warp = context.warp();
    const Quad* const weights = net.weights + layer.weights[0] + lane;
    if (layer.flags & kClearBorder) clear_border<Out>(context, layer.output);

    // Where every unit reads the same few fragments they stay in registers.
    constexpr bool kKeep = kSteps <= 3 && Out::kChannels == 16 * kGroups && kBatch == kFirst && T::kUnits > kBlockWarps;
    Quad kept[kKeep ? kSteps : 1][kBatch];
    Quad batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      batch[i] = i < kFirst ? w[i] : context.load_global(unit_weights(weights, warp) + i * kWarp);
    if constexpr (kKeep) {
#pragma unroll
      for (int step = 1; step < kSteps; step++)
#pragma unroll
        for (int i = 0; i < kBatch; i++) kept[step][i] = context.load_global(weights + (step * kBatch + i) * kWarp);
    }

#pragma unroll 1
    for (int unit = warp; unit < T::kUnits; unit += kBlockWarps) {
      const T tiling(unit);
      float sum[kTiles][2 * kGroups][4];
      begin_tiles<Out, View>(context, tiling, layer, net.vectors + layer.vector, sum);
      int source = layer.source + (lane >> 4) * In::kPlane +
                   In::at(tiling.source_row(lane) * kStride - kTop, tiling.source_column(lane) * kStride - kLeft);
      if constexpr (kKeep) {
        add_column<In, kKernel, kStride, T>(context, sum, source, batch);
#pragma unroll
        for (int step = 1; step < kSteps; step++)
          add_column<In, kKernel, kStride, T>(context, sum, source + step * 16, kept[step]);
      } else {
        const Quad* from = unit_weights(weights, unit);
#pragma unroll 1
        for (int step = 0; step < kSteps; step++) {
          const bool last = step == kSteps - 1;
          from = last ? unit_weights(weights, unit + kBlockWarps) : from + kBatch * kWarp;
          Quad ahead[kBatch];
          if (!last || unit + kBlockWarps < T::kUnits) {
#pragma unroll
            for (int i = 0; i < kBatch; i++) ahead[i] = context.load_global(from + i * kWarp);
          } else {
#pragma unroll
            for (int i = 0; i < kBatch; i++) ahead[i] = i < kFirst ? context.load_global(next + i * kWarp) : batch[i];
          }
          add_column<In, kKernel, kStride, T>(context, sum, source, batch);
#pragma unroll
          for (int i = 0; i < kBatch; i++) batch[i] = ahead[i];
          source += step % kKernel == kKernel - 1 ? 2 * In::kPlane - (kKernel - 1) * 16 : 16;
        }
      }
      if constexpr (kPooled)
        store_pooled<Out, kRelu>(context, tiling, layer, sum);
      else
        store_tiles<Out, kRelu>(context, tiling, layer, sum);
    }
    if (kKeep || kBatch < kFirst || warp >= T::kUnits) {
      load_first(context, w, next);
    } else {
#pragma unroll
      for (int i = 0; i < kFirst; i++) w[i] = batch[i < kBatch ? i : 0];
    }
  }

  static FC_FUNCTION const Quad* unit_weights(const Quad* weights, int unit) {
    return weights + unit / (T::kColumnBlocks * T::kPasses) * kStream;
  }
};

// A convolution of the image, whose up to 8 channels are one plane: a step is two taps of 8 channels each.
template <class In, class Out, int kHeight, int kWidth, int kKernel, int kStride, int kTop, int kLeft, int kTiles,
          bool kRelu, bool kPooled>
struct Stem {
  using T = Tiling<kHeight, kWidth, Out::kChannels, kTiles, 1>;
  static constexpr int kTaps = kKernel * kKernel, kSteps = (kTaps + 1) / 2;

  template <class Context>
  static FC_FUNCTION void run(Context& context, const ResidentLayer& layer, const ResidentCascade& net,
                              Quad (&w)[kFirst], const Quad* next, int) {
    const int lane = context.lane(), warp = context.warp();
    const Quad* const weights = net.weights + layer.weights[0] + lane;
    if (layer.flags & kClearBorder) clear_border<Out>(context, layer.output);
    int tap[kSteps];  // from a tile's first pixel to what this lane reads
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int second = step * 2 + 1 < kTaps ? step * 2 + 1 : step * 2;  // its weights are zero
      tap[step] = lane < 16 ? step * 2 / kKernel * In::kPitch + step * 2 % kKernel * 16
                            : second / kKernel * In::kPitch + second % kKernel * 16;
    }
#pragma unroll 1
    for (int unit = warp; unit < T::kUnits; unit += kBlockWarps) {
      const T tiling(unit);
      Quad batch[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; i++)
        batch[i] = context.load_global(weights + (tiling.group / 2 * kSteps + i) * kWarp);
      float sum[kTiles][2][4];
      begin_tiles<Out, Straight>(context, tiling, layer, net.vectors + layer.vector, sum);
      const int source =
          layer.source + In::at(tiling.source_row(lane) * kStride - kTop, tiling.source_column(lane) * kStride - kLeft);
#pragma unroll
      for (int t = 0; t < kTiles; t++)
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          unsigned int a[4];
          context.load_matrix(a, source + tap[step] + t * kStride * In::kPitch);
          multiply(context, sum[t][0], sum[t][1], a, batch[step]);
        }
      if constexpr (kPooled)
        store_pooled<Out, kRelu>(context, tiling, layer, sum);
      else
        store_tiles<Out, kRelu>(context, tiling, layer, sum);
    }
    load_first(context, w, next);
  }
};

// The image into shared memory, as a map of 8 channels; those that it does not have are zero.
template <int kChannels, class Out>
struct Image {
  template <class Context>
  static FC_FUNCTION void run(Context& context, const ResidentLayer& layer, const ResidentCascade& net,
                              Quad (&w)[kFirst], const Quad* next, int image) {
    if (layer.flags & kClearBorder) clear_border<Out>(context, layer.output);
#pragma unroll 2
    for (int i = context.thread(); i < Out::kHeight * Out::kWidth; i += kBlockThreads) {
      const int y = i / Out::kWidth, x = i % Out::kWidth;
      const long long at = image * net.strides[0] + y * net.strides[2] + x * net.strides[3];
      unsigned int half[8] = {};
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        if (net.pixel_table != nullptr) {
          const unsigned char byte = static_cast<const unsigned char*>(net.images)[at + c * net.strides[1]];
          half[c] = net.pixel_table[c * 256 + byte].bits;
        } else {
          const float value = static_cast<const float*>(net.images)[at + c * net.strides[1]];
          half[c] = context.template pack<false>(value, 0.0f);
        }
      }
      const Quad value{
          {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16}};
      context.store128(layer.output + Out::at(y, x), value);
    }
    load_first(context, w, next);
  }
};

// Maximum or average over windows that no convolution's epilogue could take.
template <class In, class Out>
struct Pool {
  template <class Context>
  static FC_FUNCTION void run(Context& context, const ResidentLayer& layer, const ResidentCascade&, Quad (&w)[kFirst],
                              const Quad* next, int) {
    if (layer.flags & kClearBorder) clear_border<Out>(context, layer.output);
    const int height = layer.window[0] & 255, width = layer.window[0] >> 8 & 255;
    const int stride_y = layer.window[0] >> 16 & 255, stride_x = layer.window[0] >> 24 & 255;
    const int top = layer.window[1] & 255, bottom = layer.window[1] >> 8 & 255;
    const int left = layer.window[1] >> 16 & 255, right = layer.window[1] >> 24 & 255;
    const bool average = layer.flags & kAverage, count_padding = layer.flags & kCountPadding;
#pragma unroll 1
    for (int i = context.thread(); i < Out::kChannels / 8 * Out::kHeight * Out::kWidth; i += kBlockThreads) {
      const int group = i / (Out::kHeight * Out::kWidth), y = i / Out::kWidth % Out::kHeight, x = i % Out::kWidth;
      float total[8] = {};
      Quad best{{0xfc00fc00, 0xfc00fc00, 0xfc00fc00, 0xfc00fc00}};  // −inf
      int cells = 0;
#pragma unroll 1
      for (int k = 0; k < height * width; k++) {
        const int from_y = y * stride_y - top + k / width, from_x = x * stride_x - left + k % width;
        const bool real = from_y >= 0 && from_y < In::kHeight && from_x >= 0 && from_x < In::kWidth;
        cells += real || (count_padding && from_y < In::kHeight + bottom && from_x < In::kWidth + right);
        if (!real) continue;
        const Quad value = context.load128(layer.source + group * In::kPlane + In::at(from_y, from_x));
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float low, high;
          context.unpack(value.word[j], low, high);
          total[j * 2] += low;
          total[j * 2 + 1] += high;
          best.word[j] = context.max2(best.word[j], value.word[j]);
        }
      }
      if (average) {
#pragma unroll
        for (int j = 0; j < 4; j++)
          best.word[j] = context.template pack<false>(total[j * 2] / cells, total[j * 2 + 1] / cells);
      }
      context.store128(layer.output + group * Out::kPlane + Out::at(y, x), best);
    }
    context.converge();
    load_first(context, w, next);
  }
};

FC_FUNCTION ExitArguments exit_arguments(const ResidentCascade& net, int stage) {
  const ResidentExit& exit = net.exits[stage];
  ExitArguments a{};
  a.log_sum = net.log_sum;
  a.weight_sum = net.weight_sum;
  a.previous_label = net.previous_label;
  a.log_probs = net.log_probs;
  a.label = net.label;
  a.exit_stage = net.exit_stage;
  a.threshold = net.thresholds + stage;
  a.mean = exit.mean, a.std = exit.std;
  a.w1 = exit.w1, a.b1 = exit.b1, a.w2 = exit.w2, a.b2 = exit.b2;
  a.stage = stage;
  a.selector = exit.selector;
  a.classes = net.classes;
  a.hidden = exit.hidden;
  a.stage_weight = exit.stage_weight;
  return a;
}

// How many threads of a warp can work on each of `parts`: a power of two.
constexpr FC_FUNCTION int threads_for_each(int parts) {
  int threads = kWarp;
  while (threads > 1 && threads * parts > kBlockThreads) threads /= 2;
  return threads;
}

// Global pooling, linear layer, exit head. Leaves all maps as they are.
// Scratch: a mean (or maximum) per channel, a row of classes per warp, the logits.
template <class In, bool kMaximum>
struct Head {
  static constexpr int kParts = In::kChannels / 8;
  static constexpr int kShare = threads_for_each(kParts);  // of 8 channels
  static constexpr int kAtOnce = kBlockThreads / kShare;

  template <class Context>
  static FC_FUNCTION void pool(Context& context, const ResidentLayer& layer) {
    const int rank = context.thread() % kShare;
#pragma unroll 1
    for (int first = 0; first < kParts; first += kAtOnce) {
      const int wanted = first + context.thread() / kShare;
      const int part = wanted < kParts ? wanted : kParts - 1;  // all lanes reach the shuffles
      float total[8];
#pragma unroll
      for (int k = 0; k < 8; k++) total[k] = kMaximum ? -infinity() : 0.0f;
#pragma unroll 2
      for (int i = rank; i < In::kHeight * In::kWidth; i += kShare) {
        const Quad value = context.load128(layer.source + part * In::kPlane + In::at(i / In::kWidth, i % In::kWidth));
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float low, high;
          context.unpack(value.word[k], low, high);
          total[k * 2] = joined(total[k * 2], low);
          total[k * 2 + 1] = joined(total[k * 2 + 1], high);
        }
      }
      context.converge();
#pragma unroll
      for (int k = 0; k < 8; k++) {
#pragma unroll
        for (int mask = kShare / 2; mask > 0; mask /= 2)
          total[k] = joined(total[k], context.shuffle_xor(total[k], mask));
        if (rank == 0 && wanted < kParts)
          context.store_float(layer.output + (part * 8 + k) * 4,
                              kMaximum ? total[k] : total[k] / (In::kHeight * In::kWidth));
      }
    }
  }

  static FC_FUNCTION float joined(float a, float b) {
    if (!kMaximum) return a + b;
    return a > b || a != a ? a : b;  // NaN wins
  }

  // Whether the image stops; the same for all threads.
  template <class Context>
  static FC_FUNCTION bool run(Context& context, const ResidentLayer& layer, const ResidentCascade& net, int stage,
                              int image) {
    const int partial = layer.output + In::kChannels * 4, logits = partial + kBlockWarps * net.classes * 4;
    pool(context, layer);
    context.sync();
    const float* const bias = net.vectors + layer.vector;
    constexpr int kSlice = In::kChannels / kBlockWarps;
    for (int c = context.lane(); c < net.classes; c += kWarp) {
      const int begin = context.warp() * kSlice;
      float sum = 0;
#pragma unroll 4
      for (int channel = begin; channel < begin + kSlice; channel++)
        sum += context.load_float(layer.output + channel * 4) * bias[net.classes * (channel + 1) + c];
      context.store_float(partial + (context.warp() * net.classes + c) * 4, sum);
    }
    context.sync();
    if (context.warp() == 0) {
      for (int c = context.lane(); c < net.classes; c += kWarp) {
        float sum = bias[c];
        for (int i = 0; i < kBlockWarps; i++) sum += context.load_float(partial + (i * net.classes + c) * 4);
        context.store_float(logits + c * 4, sum);  // read by this lane alone
      }
      context.converge();
      const bool stop = exit_row(context, exit_arguments(net, stage), context.floats(logits), image);
      if (context.lane() == 0) context.store32(kControlPlace + 4, stop);
    }
    context.sync();
    return context.load32(kControlPlace + 4) != 0;
  }
};

template <class Context>
FC_FUNCTION void run_layer(Context& context, const ResidentLayer& layer, const ResidentCascade& net, Quad (&w)[kFirst],
                           const Quad* next, int image) {
  switch (layer.type) {
#define FC_CASE(number, ...) \
  case number: return __VA_ARGS__::run(context, layer, net, w, next, image);
    FC_LAYERS(FC_CASE)
#undef FC_CASE
  }
}

template <class Context>
FC_FUNCTION bool run_head(Context& context, const ResidentLayer& layer, const ResidentCascade& net, int stage,
                          int image) {
  switch (layer.type) {
#define FC_CASE(number, ...) \
  case number: return __VA_ARGS__::run(context, layer, net, stage, image);
    FC_HEADS(FC_CASE)
#undef FC_CASE
  }
  return true;
}

// One network on one image, or one segment of a network; returns whether the image stops.
template <class Context>
FC_FUNCTION bool run_stage(Context& context, const ResidentCascade& net, int stage, int image) {
  const int first = net.begins[stage], last = net.begins[stage + 1] - 1;
  Quad w[kFirst];
  load_first(context, w, net.weights + net.layers[first].weights[context.warp()] + context.lane());
#pragma unroll 1
  for (int i = first; i < last; i++) {
    context.forget();
    const Quad* const next = net.weights + net.layers[i + 1].weights[context.warp()] + context.lane();
    run_layer(context, net.layers[i], net, w, next, image);
    context.sync();
  }
  context.forget();
  return run_head(context, net.layers[last], net, stage, image);
}

template <class Context>
FC_FUNCTION void run_cascade(Context& context, const ResidentCascade& net) {
  int upcoming = 0;
  if (context.thread() == 0) upcoming = context.atomic_add(net.queue, 1);
  for (;;) {
    if (context.thread() == 0) context.store32(kControlPlace, upcoming);
    context.sync();
    const int image = static_cast<int>(context.load32(kControlPlace));
    if (image >= net.count) return;
    if (context.thread() == 0) upcoming = context.atomic_add(net.queue, 1);  // back long before it is needed
    bool stop = false;
#pragma unroll 1
    for (int stage = 0; stage < net.stages && !stop; stage++) stop = run_stage(context, net, stage, image);
    if (net.keep != nullptr && context.thread() == 0) {
      net.keep[image] = !stop;
      if (!stop) context.atomic_add(net.block_counts + image / kRows, 1);
    }
  }
}

}  // namespace fastcascade
