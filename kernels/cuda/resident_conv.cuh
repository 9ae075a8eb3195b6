// Convolutions as implicit GEMM with mma.m16n8k16.
//
// A warp computes a unit (resident_maps.cuh) at a time, over all of K. For every 16 input channels and every kernel
// column it walks down the input rows: one ldmatrix.x4 gives a row of tiles, which is the A fragment of up to three
// output tiles (one per kernel row) and all channel groups, so 6 · kGroups independent mma follow one load. Only the
// sums stay in registers. With a group of images, the fragments of the weights serve all of them: the weights come
// from L2, which would otherwise be the limit of layers with many channels and few pixels.
#pragma once

#include "resident_maps.cuh"

namespace fastcascade {

// Offsets in shared memory of a layer's maps, for the image that it runs on, or for the first of a group.
struct Offsets {
  int source, output, residual;
  FC_FUNCTION Offsets(const ResidentLayer& layer, int slot)
      : source(layer.source + slot * layer.source_step),
        output(layer.output + slot * layer.output_step),
        residual(layer.residual + slot * layer.residual_step) {}
};

// What a layer's body is given besides the context.
//   weights: this layer's first fragments; after the body, those of the next layer, read from `next`.
//   image: of the batch; used by the first layer of a network.
constexpr int kFirst = 3;
struct Work {
  const ResidentCascade& net;
  const ResidentLayer& layer;
  Offsets offsets;
  const Quad* next;
  int image;
};

template <class Context>
FC_FUNCTION void load_first(Context& context, Quad (&w)[kFirst], const Quad* from) {
#pragma unroll
  for (int i = 0; i < kFirst; i++) w[i] = context.load_global(from + i * kWarp);
}

enum Activation { kNone, kRelu, kGelu, kGeluTanh };

// NaN stays NaN.
template <Activation kActivation>
FC_FUNCTION float activated(float x) {
  if (kActivation == kRelu) return x < 0 ? 0.0f : x;
  if (kActivation == kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if (kActivation == kGeluTanh) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  return x;
}

// Two channels, activated and rounded to fp16.
template <Activation kActivation, class Context>
FC_FUNCTION unsigned int pack_activated(Context& context, float low, float high) {
  if (kActivation == kRelu) return context.template pack<true>(low, high);
  return context.template pack<false>(activated<kActivation>(low), activated<kActivation>(high));
}

// A residual of the convolution's shape, if any.
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
FC_FUNCTION void add_residual(Context& context, const T& tiling, int offset, int tile, int n, int half,
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
  context.unpack(context.load32(offset + at), low, high);
  sum[half * 2] += low;
  sum[half * 2 + 1] += high;
}

// The sums of one image begin with the bias, and with the residual if it comes before the activation.
template <class M, class View, class T, class Context>
FC_FUNCTION void begin_tiles(Context& context, const T& tiling, const Work& work, int residual,
                             float (&sum)[T::kTiles][2 * T::kGroups][4]) {
  const float* const bias = work.net.vectors + work.layer.vector;
  const float* const from = bias + tiling.group * 8 + (context.lane() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 2 * T::kGroups; n++) {
    const float low = from[n * 8], high = from[n * 8 + 1];
#pragma unroll
    for (int t = 0; t < T::kTiles; t++) sum[t][n][0] = sum[t][n][2] = low, sum[t][n][1] = sum[t][n][3] = high;
  }
  if (work.layer.flags & kResidualFirst) {
#pragma unroll
    for (int t = 0; t < T::kTiles; t++)
#pragma unroll
      for (int n = 0; n < 2 * T::kGroups; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) add_residual<M, View>(context, tiling, residual, t, n, half, sum[t][n]);
  }
  context.converge();  // lanes outside the map read nothing; ldmatrix and mma need all of them
}

template <class M, Activation kActivation, class T, class Context>
FC_FUNCTION void store_tiles(Context& context, const T& tiling, int flags, int output, int residual,
                             float (&sum)[T::kTiles][2 * T::kGroups][4]) {
  const int lane = context.lane();
  const int offset = output + tiling.group * M::kPlane + (lane & 3) * 4;
#pragma unroll
  for (int t = 0; t < T::kTiles; t++)
#pragma unroll
    for (int n = 0; n < 2 * T::kGroups; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        unsigned int value;
        if (flags & kResidualLast) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; i++) sum[t][n][i] = activated<kActivation>(sum[t][n][i]);
          add_residual<M, Straight>(context, tiling, residual, t, n, half, sum[t][n]);
          value = context.template pack<false>(sum[t][n][half * 2], sum[t][n][half * 2 + 1]);
        } else {
          value = pack_activated<kActivation>(context, sum[t][n][half * 2], sum[t][n][half * 2 + 1]);
        }
        if (tiling.inside(lane, t, half))
          context.store32(offset + n * M::kPlane + M::at(tiling.result_row(lane, t, half), tiling.result_column(lane)),
                          value);
      }
}

// 2×2 maximum of the result, then the activation. A thread holds both rows of a window; its neighbour (lane ^ 4) holds
// the other column. Each of the two finishes one of their two groups of 8 channels.
template <class M, Activation kActivation, class T, class Context>
FC_FUNCTION void store_pooled(Context& context, const T& tiling, int output,
                              float (&sum)[T::kTiles][2 * T::kGroups][4]) {
  static_assert(T::kTiles % 2 == 0, "both rows of a window are in one thread");
  const int lane = context.lane(), odd = lane >> 2 & 1;
  const int x = tiling.result_column(lane) / 2;
  const int offset = output + (tiling.group + odd) * M::kPlane + (lane & 3) * 4;
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
          best[n] = context.max2(context.template pack<kActivation == kRelu>(upper[half * 2], upper[half * 2 + 1]),
                                 context.template pack<kActivation == kRelu>(lower[half * 2], lower[half * 2 + 1]));
        }
        const unsigned int other = context.shuffle_xor(odd ? best[0] : best[1], 4);
        unsigned int value = context.max2(odd ? best[1] : best[0], other);
        if (kActivation == kGelu || kActivation == kGeluTanh) {
          float low, high;
          context.unpack(value, low, high);
          value = pack_activated<kActivation>(context, low, high);
        }
        const int y = tiling.result_row(lane, t, half) / 2;
        if (y < M::kHeight && x < M::kWidth) context.store32(offset + g * 2 * M::kPlane + M::at(y, x), value);
      }
}

// Channels n·8 … n·8 + 15 of a tile.
template <class Context>
FC_FUNCTION void multiply(Context& context, float (&low)[4], float (&high)[4], const unsigned int (&a)[4],
                          const Quad& w) {
  context.mma(low, a, w.word[0], w.word[1]);
  context.mma(high, a, w.word[2], w.word[3]);
}

// One kernel column, 16 input channels: down the input rows of every image.
template <class In, int kKernel, int kStride, int kImages, class T, class Context>
FC_FUNCTION void add_column(Context& context, float (&sum)[kImages][T::kTiles][2 * T::kGroups][4], int source,
                            const Quad (&w)[kKernel * T::kGroups]) {
#pragma unroll
  for (int image = 0; image < kImages; image++)
#pragma unroll
    for (int r = 0; r < (T::kTiles - 1) * kStride + kKernel; r++) {
      if (kKernel < kStride && r % kStride >= kKernel) continue;  // a row that no tile reads
      unsigned int a[4];
      context.load_matrix(a, source + image * In::kBytes + r * In::kPitch);
#pragma unroll
      for (int ky = 0; ky < kKernel; ky++) {
        const int tile = (r - ky) / kStride;
        if (r >= ky && (r - ky) % kStride == 0 && tile < T::kTiles) {
#pragma unroll
          for (int g = 0; g < T::kGroups; g++)
            multiply(context, sum[image][tile][g * 2], sum[image][tile][g * 2 + 1], a, w[ky * T::kGroups + g]);
        }
      }
    }
}

// A convolution of a map, of one image or of a group. kHeight, kWidth: of its result, before pooling.
template <class In, class Out, int kHeight, int kWidth, int kKernel, int kStride, int kTop, int kLeft, int kTiles,
          int kGroups, int kImages, Activation kActivation, bool kPooled, class View>
struct Conv {
  using T = Tiling<kHeight, kWidth, Out::kChannels, kTiles, kGroups>;
  using Whole = Map<Out::kChannels, kHeight, kWidth>;  // of a residual: the result before pooling
  static constexpr int kBatch = kKernel * kGroups;     // fragments of a step: a kernel column, 16 input channels
  static constexpr int kSteps = In::kChannels / 16 * kKernel;
  static constexpr int kStream = kSteps * kBatch * kWarp;  // of a unit, in 16-byte words
  static_assert(kTiles * kGroups * kImages <= 16, "sums fit into 128 registers");

  // Bytes from the residual of one image to that of the next.
  static constexpr FC_FUNCTION int residual_bytes() {
    if constexpr (View::kStrided)
      return View::Source::kBytes;
    else
      return Whole::kBytes;
  }

  template <class Context>
  static FC_FUNCTION void run(Context& context, const Work& work, Quad (&w)[kFirst]) {
    const int lane = context.lane(), warp = context.warp();
    const Quad* const weights = work.net.weights + work.layer.weights[0] + lane;
    if (work.layer.flags & kClearBorder) clear_border<Out, kImages>(context, work.offsets.output);

    // If every unit reads the same few fragments, they stay in registers.
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
      float sum[kImages][kTiles][2 * kGroups][4];
#pragma unroll
      for (int image = 0; image < kImages; image++)
        begin_tiles<Whole, View>(context, tiling, work, work.offsets.residual + image * residual_bytes(), sum[image]);
      int source = work.offsets.source + (lane >> 4) * In::kPlane +
                   In::at(tiling.source_row(lane) * kStride - kTop, tiling.source_column(lane) * kStride - kLeft);
      if constexpr (kKeep) {
        add_column<In, kKernel, kStride, kImages, T>(context, sum, source, batch);
#pragma unroll
        for (int step = 1; step < kSteps; step++)
          add_column<In, kKernel, kStride, kImages, T>(context, sum, source + step * 16, kept[step]);
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
            for (int i = 0; i < kBatch; i++)
              ahead[i] = i < kFirst ? context.load_global(work.next + i * kWarp) : batch[i];
          }
          add_column<In, kKernel, kStride, kImages, T>(context, sum, source, batch);
#pragma unroll
          for (int i = 0; i < kBatch; i++) batch[i] = ahead[i];
          source += step % kKernel == kKernel - 1 ? 2 * In::kPlane - (kKernel - 1) * 16 : 16;
        }
      }
#pragma unroll
      for (int image = 0; image < kImages; image++) {
        const int output = work.offsets.output + image * Out::kBytes;
        if constexpr (kPooled)
          store_pooled<Out, kActivation>(context, tiling, output, sum[image]);
        else
          store_tiles<Out, kActivation>(context, tiling, work.layer.flags, output,
                                        work.offsets.residual + image * Out::kBytes, sum[image]);
      }
    }
    if (kKeep || kBatch < kFirst || warp >= T::kUnits) {
      load_first(context, w, work.next);
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
          Activation kActivation, bool kPooled>
struct Stem {
  using T = Tiling<kHeight, kWidth, Out::kChannels, kTiles, 1>;
  static constexpr int kTaps = kKernel * kKernel, kSteps = (kTaps + 1) / 2;

  template <class Context>
  static FC_FUNCTION void run(Context& context, const Work& work, Quad (&w)[kFirst]) {
    const int lane = context.lane(), warp = context.warp();
    const Quad* const weights = work.net.weights + work.layer.weights[0] + lane;
    if (work.layer.flags & kClearBorder) clear_border<Out, 1>(context, work.offsets.output);
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
      begin_tiles<Out, Straight>(context, tiling, work, 0, sum);
      const int source = work.offsets.source +
                         In::at(tiling.source_row(lane) * kStride - kTop, tiling.source_column(lane) * kStride - kLeft);
#pragma unroll
      for (int t = 0; t < kTiles; t++)
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          unsigned int a[4];
          context.load_matrix(a, source + tap[step] + t * kStride * In::kPitch);
          multiply(context, sum[t][0], sum[t][1], a, batch[step]);
        }
      if constexpr (kPooled)
        store_pooled<Out, kActivation>(context, tiling, work.offsets.output, sum);
      else
        store_tiles<Out, kActivation>(context, tiling, 0, work.offsets.output, 0, sum);
    }
    load_first(context, w, work.next);
  }
};

}  // namespace fastcascade
