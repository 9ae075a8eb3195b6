#include "steps.h"

#include <algorithm>
#include <cstring>

namespace fastcascade {
namespace {

// The part of `count` items that a thread takes, cut at multiples of `grain`.
Range part(int64_t count, int64_t grain, Share share) {
  const int64_t grains = (count + grain - 1) / grain;
  return {std::min(count, grains * share.rank / share.size * grain),
          std::min(count, grains * (share.rank + 1) / share.size * grain)};
}

// Splits a convolution over output positions, or over output channels where positions are too few to fill
// registers on every thread.
void split(int64_t positions, int64_t blocks, const KernelTable& kernels, Share share, Range& mine, Range& my_blocks) {
  mine = {0, positions};
  my_blocks = {0, blocks};
  if (share.size == 1) return;
  if (positions < share.size * kernels.tile_rows && blocks >= share.size * kernels.pair)
    my_blocks = part(blocks, kernels.pair, share);
  else
    mine = part(positions, 1, share);
}

template <class T, class Read>
void load_image(const Value& v, const T* image, const int64_t* strides, float* out, Range rows, Read read) {
  const int64_t width = v.shape.w;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    float* line = out + y * width * v.pitch;
    for (int64_t c = 0; c < v.shape.c; ++c) {
      const T* from = image + c * strides[1] + y * strides[2];
      for (int64_t x = 0; x < width; ++x) line[x * v.pitch + c] = read(c, from[x * strides[3]]);
    }
    for (int64_t c = v.shape.c; c < v.pitch; ++c)
      for (int64_t x = 0; x < width; ++x) line[x * v.pitch + c] = 0.f;
  }
}

void load(const Value& v, const Source& source, int64_t row, float* out, Range rows) {
  if (source.features) {
    const int64_t line = v.shape.w * v.pitch;
    std::memcpy(out + rows.begin * line, source.features + row * source.feature_floats + rows.begin * line,
                static_cast<size_t>((rows.end - rows.begin) * line) * sizeof(float));
  } else if (source.bytes) {
    load_image(v, static_cast<const uint8_t*>(source.images) + row * source.strides[0], source.strides, out, rows,
               [&](int64_t c, uint8_t byte) { return source.table[c * 256 + byte]; });
  } else {
    load_image(v, static_cast<const float*>(source.images) + row * source.strides[0], source.strides, out, rows,
               [](int64_t, float x) { return x; });
  }
}

// Pixels that lie beside each other in one row of an image; finding the row takes longer than moving a pixel.
struct Line {
  int64_t image, row, column, count;
};

Line line_at(int64_t pixel, int64_t end, const Shape& shape) {
  const int64_t area = shape.h * shape.w, column = pixel % shape.w;
  return {pixel / area, pixel % area / shape.w, column, std::min(shape.w - column, end - pixel)};
}

int64_t image_offset(const Value& v, int64_t image, int64_t row, int64_t column) {
  return image * v.floats + (row * v.shape.w + column) * v.pitch;
}

// A call of memmove takes longer than to move a few channels.
void copy_channels(const float* from, int64_t count, float* to) {
  constexpr int64_t kTogether = 8;
  const int64_t whole = count / kTogether * kTogether;
  for (int64_t c = 0; c < whole; c += kTogether) std::memcpy(to + c, from + c, kTogether * sizeof(float));
  for (int64_t c = whole; c < count; ++c) to[c] = from[c];
}

void pad(const Step& step, const Value& in, const Value& out, const float* x, float* y, Range pixels) {
  const auto& before = step.layout.before;
  const float value = step.layout.value;
  const bool same_channels = in.shape.c == out.shape.c && in.pitch == out.pitch;
  Line line;
  for (int64_t p = pixels.begin; p < pixels.end; p += line.count) {
    line = line_at(p, pixels.end, out.shape);
    const int64_t row = line.row - before[1], column = line.column - before[2];  // of the input
    const bool inside = row >= 0 && row < in.shape.h;
    const int64_t begin = inside ? std::clamp<int64_t>(-column, 0, line.count) : line.count;
    const int64_t end = inside ? std::clamp<int64_t>(in.shape.w - column, begin, line.count) : line.count;
    float* to = y + p * out.pitch;
    std::fill(to, to + begin * out.pitch, value);
    std::fill(to + end * out.pitch, to + line.count * out.pitch, value);
    if (begin == end) continue;
    const float* from = x + image_offset(in, line.image, row, column + begin);
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

void slice(const Step& step, const Value& in, const Value& out, const float* x, float* y, Range pixels) {
  const OpSpec& op = step.layout;
  Line line;
  for (int64_t p = pixels.begin; p < pixels.end; p += line.count) {
    line = line_at(p, pixels.end, out.shape);
    const float* from =
        x + op.start[0] +
        image_offset(in, line.image, op.start[1] + line.row * op.step[1], op.start[2] + line.column * op.step[2]);
    float* to = y + p * out.pitch;
    for (int64_t i = 0; i < line.count; ++i, from += op.step[2] * in.pitch, to += out.pitch) {
      if (op.step[0] == 1)
        copy_channels(from, out.shape.c, to);
      else
        for (int64_t c = 0; c < out.shape.c; ++c) to[c] = from[c * op.step[0]];
      std::fill(to + out.shape.c, to + out.pitch, 0.f);
    }
  }
}

// Channels of a concatenation come from one input after the other.
void concat(const Network& net, const Step& step, float* const* inputs, float* y, Range pixels) {
  const Value& out = net.values[step.output];
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    float* pixel = y + p * out.pitch;
    for (size_t i = 0; i < step.inputs.size(); ++i) {
      const Value& in = net.values[step.inputs[i]];
      pixel = std::copy_n(inputs[i] + p * in.pitch, in.shape.c, pixel);
    }
    std::fill(pixel, y + (p + 1) * out.pitch, 0.f);
  }
}

void flatten(const Value& in, const Value& out, const float* x, float* y, Range instances) {
  const int64_t area = in.shape.h * in.shape.w;
  for (int64_t n = instances.begin; n < instances.end; ++n) {
    float* row = y + n * out.pitch;
    for (int64_t p = 0; p < area; ++p)
      for (int64_t c = 0; c < in.shape.c; ++c) row[c * area + p] = x[n * in.floats + p * in.pitch + c];
    std::fill(row + out.shape.c, row + out.pitch, 0.f);
  }
}

}  // namespace

void run_step(const Network& net, const Step& step, const Source& source, float* arena, float* scratch, int64_t first,
              int64_t instances, Share share) {
  const auto at = [&](int64_t v) {
    const Value& value = net.values[v];
    return arena + value.offset + (value.whole ? first * value.floats : 0);
  };
  const KernelTable& kernels = *net.kernels;
  const Value& out = net.values[step.output];
  const Value& in = step.inputs.empty() ? out : net.values[step.inputs[0]];
  const float* x = step.inputs.empty() ? nullptr : at(step.inputs[0]);
  const float* residual = step.residual < 0 ? nullptr : at(step.residual);
  float* y = at(step.output);
  const int64_t work = step.work * instances;
  Range mine, blocks;
  switch (step.kind) {
    case StepKind::load:
      for (int64_t n = 0; n < instances; ++n)
        load(out, source, source.rows[first + n], y + n * out.floats, part(step.work, 1, share));
      return;
    case StepKind::direct: {
      DirectConv c = step.direct;
      c.input = x;
      c.output = y;
      c.epilogue.residual = residual;
      split(work, step.blocks, kernels, share, mine, blocks);
      // Grouped convolutions are split over pixels only and count their blocks here.
      if (step.blocks == 1) blocks = {0, out.pitch / kernels.lanes};
      return kernels.conv_direct_f32(c, mine, blocks);
    }
    case StepKind::winograd: {
      Winograd c = step.winograd;
      c.input = x;
      c.output = y;
      c.scratch = scratch;
      c.epilogue.residual = residual;
      split(work, step.blocks, kernels, share, mine, blocks);
      return kernels.conv3x3_winograd_f32(c, mine, blocks);
    }
    case StepKind::depthwise: {
      DepthwiseConv c = step.depthwise;
      c.input = x;
      c.output = y;
      c.epilogue.residual = residual;
      return kernels.conv_depthwise_f32(c, part(work, 1, share));
    }
    case StepKind::pool: {
      Pool c = step.pool;
      c.input = x;
      c.output = y;
      return kernels.pool_f32(c, part(work, 1, share));
    }
    case StepKind::elementwise: {
      Elementwise c = step.elementwise;
      c.input = x;
      c.output = y;
      c.other = step.inputs.size() > 1 ? at(step.inputs[1]) : nullptr;
      return kernels.elementwise_f32(c, part(work, 1, share));
    }
    case StepKind::pad: return pad(step, in, out, x, y, part(work, 1, share));
    case StepKind::slice: return slice(step, in, out, x, y, part(work, 1, share));
    case StepKind::flatten: return flatten(in, out, x, y, part(work, 1, share));
    case StepKind::concat: {
      float* inputs[64];
      for (size_t i = 0; i < step.inputs.size(); ++i) inputs[i] = at(step.inputs[i]);
      return concat(net, step, inputs, y, part(work, 1, share));
    }
  }
}

}  // namespace fastcascade
