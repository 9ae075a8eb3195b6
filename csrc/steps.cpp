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
  for (int64_t y = rows.begin; y < rows.end; ++y)
    for (int64_t x = 0; x < v.shape.w; ++x) {
      float* pixel = out + (y * v.shape.w + x) * v.pitch;
      const T* from = image + y * strides[2] + x * strides[3];
      for (int64_t c = 0; c < v.shape.c; ++c) pixel[c] = read(c, from[c * strides[1]]);
      for (int64_t c = v.shape.c; c < v.pitch; ++c) pixel[c] = 0.f;
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

void pad(const Step& step, const Value& in, const Value& out, const float* x, float* y, Range pixels) {
  const auto& before = step.layout.before;
  const int64_t per_image = out.shape.h * out.shape.w;
  const float value = step.layout.value;
  // Where pixels keep their channels, the inside of a row moves as one.
  const bool same_channels = in.shape.c == out.shape.c && in.pitch == out.pitch;
  int64_t run;  // pixels
  for (int64_t p = pixels.begin; p < pixels.end; p += run) {
    const int64_t image = p / per_image, row = p % per_image / out.shape.w - before[1],
                  column = p % out.shape.w - before[2];
    float* pixel = y + p * out.pitch;
    const bool inside = row >= 0 && row < in.shape.h && column >= 0 && column < in.shape.w;
    run = inside && same_channels ? std::min(in.shape.w - column, pixels.end - p) : 1;
    if (!inside || (!same_channels && in.shape.c < out.pitch)) std::fill_n(pixel, out.pitch, value);
    if (!inside) continue;
    const float* from = x + image * in.floats + (row * in.shape.w + column) * in.pitch;
    std::copy_n(from, same_channels ? run * in.pitch : in.shape.c, pixel + before[0]);
  }
}

void slice(const Step& step, const Value& in, const Value& out, const float* x, float* y, Range pixels) {
  const OpSpec& op = step.layout;
  const int64_t per_image = out.shape.h * out.shape.w;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const int64_t image = p / per_image, row = op.start[1] + p % per_image / out.shape.w * op.step[1],
                  column = op.start[2] + p % out.shape.w * op.step[2];
    const float* from = x + image * in.floats + (row * in.shape.w + column) * in.pitch + op.start[0];
    float* pixel = y + p * out.pitch;
    if (op.step[0] == 1)
      std::copy_n(from, out.shape.c, pixel);
    else
      for (int64_t c = 0; c < out.shape.c; ++c) pixel[c] = from[c * op.step[0]];
    std::fill(pixel + out.shape.c, pixel + out.pitch, 0.f);
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

void run_step(const Network& net, const Step& step, const Source& source, float* arena, float* scratch,
              int64_t first, int64_t instances, Share share) {
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
