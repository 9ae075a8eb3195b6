// The other layers of the resident kernel: reading the image, pooling, and the head with the exit.
#pragma once

#include "resident_conv.cuh"

namespace fastcascade {

// The image into shared memory, as a map of 8 channels; those that it does not have are zero.
template <int kChannels, class Out>
struct Image {
  template <class Context>
  static FC_FUNCTION void run(Context& context, const Work& work, Quad (&w)[kFirst]) {
    const ResidentCascade& net = work.net;
    if (work.layer.flags & kClearBorder) clear_border<Out, 1>(context, work.offsets.output);
    const bool mirror = work.layer.flags & kMirror;
#pragma unroll 2
    for (int i = context.thread(); i < Out::kHeight * Out::kWidth; i += kBlockThreads) {
      const int y = i / Out::kWidth, x = i % Out::kWidth;
      const long long at = work.image * net.strides[0] + y * net.strides[2] + x * net.strides[3];
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
      context.store128(work.offsets.output + Out::at(y, mirror ? Out::kWidth - 1 - x : x), value);
    }
    load_first(context, w, work.next);
  }
};

// Maximum or average over windows that no convolution's epilogue could take. A group of images is one map of all
// their channels.
template <class In, class Out>
struct Pool {
  template <class Context>
  static FC_FUNCTION void run(Context& context, const Work& work, Quad (&w)[kFirst]) {
    const ResidentLayer& layer = work.layer;
    if (layer.flags & kClearBorder) clear_border<Out, 1>(context, work.offsets.output);
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
        const Quad value = context.load128(work.offsets.source + group * In::kPlane + In::at(from_y, from_x));
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
      context.store128(work.offsets.output + group * Out::kPlane + Out::at(y, x), best);
    }
    context.converge();
    load_first(context, w, work.next);
  }
};

FC_FUNCTION ExitArguments exit_arguments(const ResidentCascade& net, int stage) {
  const ResidentExit& exit = net.exits[stage];
  ExitArguments a{};
  a.tables = net.tables;
  a.threshold = net.thresholds + stage;
  a.mlp = exit.mlp;
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
  static FC_FUNCTION void pool(Context& context, const Offsets& offsets) {
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
        const Quad value = context.load128(offsets.source + part * In::kPlane + In::at(i / In::kWidth, i % In::kWidth));
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float low, high;
          context.unpack(value.word[k], low, high);
          total[k * 2] = combined(total[k * 2], low);
          total[k * 2 + 1] = combined(total[k * 2 + 1], high);
        }
      }
      context.converge();
#pragma unroll
      for (int k = 0; k < 8; k++) {
#pragma unroll
        for (int mask = kShare / 2; mask > 0; mask /= 2)
          total[k] = combined(total[k], context.shuffle_xor(total[k], mask));
        if (rank == 0 && wanted < kParts)
          context.store_float(offsets.output + (part * 8 + k) * 4,
                              kMaximum ? total[k] : total[k] / (In::kHeight * In::kWidth));
      }
    }
  }

  static FC_FUNCTION float combined(float a, float b) {
    if (!kMaximum) return a + b;
    return a > b || a != a ? a : b;  // NaN wins
  }

  // Whether the image stops; the same for all threads.
  template <class Context>
  static FC_FUNCTION bool run(Context& context, const Work& work, int stage) {
    const ResidentCascade& net = work.net;
    const int partial = work.offsets.output + In::kChannels * 4, logits = partial + kBlockWarps * net.classes * 4;
    pool(context, work.offsets);
    context.sync();
    const float* const bias = net.vectors + work.layer.vector;
    constexpr int kSlice = In::kChannels / kBlockWarps;
    for (int c = context.lane(); c < net.classes; c += kWarp) {
      const int begin = context.warp() * kSlice;
      float sum = 0;
#pragma unroll 4
      for (int channel = begin; channel < begin + kSlice; channel++)
        sum += context.load_float(work.offsets.output + channel * 4) * bias[net.classes * (channel + 1) + c];
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
      const bool stop = exit_row(context, exit_arguments(net, stage), context.floats(logits), work.image);
      if (context.lane() == 0) context.store32(kStopWord * 4, stop);
    }
    context.sync();
    return context.load32(kStopWord * 4) != 0;
  }
};

}  // namespace fastcascade
