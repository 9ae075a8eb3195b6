#include "layout_steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fastcascade {
namespace {

template <class T, class Convert>
void load_image_lines(const Value& v, const Images& images, int64_t index, float* y, Range lines, Convert convert) {
  const T* image = static_cast<const T*>(images.data) + index * images.strides[0];
  const int64_t width = v.shape.w, step = images.strides[3];
  for (int64_t h = lines.begin; h < lines.end; ++h) {
    float* line = y + h * width * v.pitch;
    for (int64_t c = 0; c < v.shape.c; ++c) {
      const T* from = image + c * images.strides[1] + h * images.strides[2];
      for (int64_t w = 0; w < width; ++w) line[w * v.pitch + c] = convert(c, from[w * step]);
    }
    for (int64_t c = v.shape.c; c < v.pitch; ++c)
      for (int64_t w = 0; w < width; ++w) line[w * v.pitch + c] = 0.f;
  }
}

// Pixels beside each other in one line of an instance. Its coordinates take longer to find than a pixel to move.
struct PixelRun {
  int64_t instance, y, x, count;
};

PixelRun run_at(int64_t pixel, int64_t end, const Shape& shape) {
  const int64_t area = shape.h * shape.w, x = pixel % shape.w;
  return {pixel / area, pixel % area / shape.w, x, std::min(shape.w - x, end - pixel)};
}

int64_t pixel_offset(const Value& v, int64_t instance, int64_t y, int64_t x) {
  return instance * v.floats + (y * v.shape.w + x) * v.pitch;
}

// Copies by 32 bytes: a call of memmove takes longer than to move a few channels.
void copy_channels(const float* from, int64_t count, float* to) {
  constexpr int64_t kChunk = 8;
  const int64_t chunked = count / kChunk * kChunk;
  for (int64_t c = 0; c < chunked; c += kChunk) std::memcpy(to + c, from + c, kChunk * sizeof(float));
  for (int64_t c = chunked; c < count; ++c) to[c] = from[c];
}

// The pixel along an axis of `size` that reflect or replicate padding puts at position i of the input.
int64_t padding_source(PadMode mode, int64_t i, int64_t size) {
  if (mode == PadMode::replicate) return std::clamp<int64_t>(i, 0, size - 1);
  return i < 0 ? -i : i < size ? i : 2 * (size - 1) - i;
}

void pad_with_pixels(const Network& net, const Step& step, const float* x, float* y, Range pixels) {
  const Value &in = net.values[step.inputs[0]], &out = net.values[step.output];
  const OpSpec& op = step.layout;
  PixelRun run;
  for (int64_t p = pixels.begin; p < pixels.end; p += run.count) {
    run = run_at(p, pixels.end, out.shape);
    const float* line =
        x + pixel_offset(in, run.instance, padding_source(op.pad_mode, run.y - op.before[1], in.shape.h), 0);
    for (int64_t i = 0; i < run.count; ++i)
      copy_channels(line + padding_source(op.pad_mode, run.x + i - op.before[2], in.shape.w) * in.pitch, in.pitch,
                    y + (p + i) * out.pitch);
  }
}

}  // namespace

void load_lines(const Network& net, const Source& source, int64_t instance, float* y, Range lines) {
  const Value& v = net.values[0];
  const int64_t index = source.index[instance];
  if (source.features) {
    const int64_t line = v.shape.w * v.pitch, first = lines.begin * line;
    std::memcpy(y + first, source.features + index * source.feature_floats + first,
                static_cast<size_t>((lines.end - lines.begin) * line) * sizeof(float));
  } else if (source.images->bytes) {
    const float* table = source.images->table;
    load_image_lines<uint8_t>(v, *source.images, index, y, lines,
                              [table](int64_t c, uint8_t byte) { return table[c * 256 + byte]; });
  } else if (net.input_kind == StageInput::features) {
    load_image_lines<float>(v, *source.images, index, y, lines, [](int64_t, float x) { return x; });
  } else {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    load_image_lines<float>(v, *source.images, index, y, lines,
                            [](int64_t, float x) { return std::fabs(x) <= kMaxPixel ? x : nan; });
  }
}

void pad_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels) {
  if (step.layout.pad_mode != PadMode::constant) return pad_with_pixels(net, step, x, y, pixels);
  const Value &in = net.values[step.inputs[0]], &out = net.values[step.output];
  const auto& before = step.layout.before;
  const float value = step.layout.value;
  const bool same_channels = in.shape.c == out.shape.c && in.pitch == out.pitch;
  PixelRun run;
  for (int64_t p = pixels.begin; p < pixels.end; p += run.count) {
    run = run_at(p, pixels.end, out.shape);
    const int64_t in_y = run.y - before[1], in_x = run.x - before[2];
    const bool inside = in_y >= 0 && in_y < in.shape.h;
    // Pixels [begin, end) of the run come from the input.
    const int64_t begin = inside ? std::clamp<int64_t>(-in_x, 0, run.count) : run.count;
    const int64_t end = inside ? std::clamp<int64_t>(in.shape.w - in_x, begin, run.count) : run.count;
    float* to = y + p * out.pitch;
    std::fill(to, to + begin * out.pitch, value);
    std::fill(to + end * out.pitch, to + run.count * out.pitch, value);
    if (begin == end) continue;
    const float* from = x + pixel_offset(in, run.instance, in_y, in_x + begin);
    to += begin * out.pitch;
    if (same_channels) {
      std::copy_n(from, (end - begin) * in.pitch, to);
      continue;
    }
    for (int64_t i = begin; i < end; ++i, from += in.pitch, to += out.pitch) {
      std::fill(to, to + before[0], value);
      copy_channels(from, in.shape.c, to + before[0]);
      std::fill(to + before[0] + in.shape.c, to + out.pitch, value);
    }
  }
}

void reorder_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels) {
  const Value &in = net.values[step.inputs[0]], &out = net.values[step.output];
  const std::vector<int64_t>& channels = step.layout.channels;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const float* from = x + p * in.pitch;
    float* to = y + p * out.pitch;
    for (int64_t c = 0; c < out.shape.c; ++c) to[c] = from[channels[c]];
    std::fill(to + out.shape.c, to + out.pitch, 0.f);
  }
}

void reshape_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels) {
  const Value &in = net.values[step.inputs[0]], &out = net.values[step.output];
  const int64_t in_area = in.shape.h * in.shape.w, area = out.shape.h * out.shape.w;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const float* image = x + p / area * in.floats;
    float* to = y + p * out.pitch;
    for (int64_t c = 0; c < out.shape.c; ++c) {
      const int64_t place = c * area + p % area;  // in (C, H, W) order
      to[c] = image[place % in_area * in.pitch + place / in_area];
    }
    std::fill(to + out.shape.c, to + out.pitch, 0.f);
  }
}

void slice_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels) {
  const Value &in = net.values[step.inputs[0]], &out = net.values[step.output];
  const OpSpec& op = step.layout;
  PixelRun run;
  for (int64_t p = pixels.begin; p < pixels.end; p += run.count) {
    run = run_at(p, pixels.end, out.shape);
    const float* from =
        x + op.start[0] +
        pixel_offset(in, run.instance, op.start[1] + run.y * op.step[1], op.start[2] + run.x * op.step[2]);
    float* to = y + p * out.pitch;
    for (int64_t i = 0; i < run.count; ++i, from += op.step[2] * in.pitch, to += out.pitch) {
      if (op.step[0] == 1)
        copy_channels(from, out.shape.c, to);
      else
        for (int64_t c = 0; c < out.shape.c; ++c) to[c] = from[c * op.step[0]];
      std::fill(to + out.shape.c, to + out.pitch, 0.f);
    }
  }
}

void concat_f32(const Network& net, const Step& step, const float* const* inputs, float* y, Range pixels) {
  const Value& out = net.values[step.output];
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    float* to = y + p * out.pitch;
    for (size_t i = 0; i < step.inputs.size(); ++i) {
      const Value& in = net.values[step.inputs[i]];
      to = std::copy_n(inputs[i] + p * in.pitch, in.shape.c, to);
    }
    std::fill(to, y + (p + 1) * out.pitch, 0.f);
  }
}

void flatten_f32(const Network& net, const Step& step, const float* x, float* y, Range instances) {
  const Value &in = net.values[step.inputs[0]], &out = net.values[step.output];
  const int64_t area = in.shape.h * in.shape.w;
  for (int64_t n = instances.begin; n < instances.end; ++n) {
    float* to = y + n * out.pitch;
    for (int64_t p = 0; p < area; ++p)
      for (int64_t c = 0; c < in.shape.c; ++c) to[c * area + p] = x[n * in.floats + p * in.pitch + c];
    std::fill(to + out.shape.c, to + out.pitch, 0.f);
  }
}

}  // namespace fastcascade
