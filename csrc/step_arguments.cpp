#include "step_arguments.h"

#include <algorithm>

namespace fastcascade {
namespace {

PoolAxis pool_axis(const OpSpec& op, int axis, int64_t in, int64_t count) {
  if (op.kind == OpKind::adaptive_pool) return {in, count, 0, 0, 0, 0};
  return {in, count, op.kernel[axis], op.stride[axis], op.padding[2 * axis], op.padding[2 * axis + 1]};
}

// Where an operand advances when the output does.
Operand operand(const Value& v, const Shape& out) {
  Operand o{};
  o.image_step = v.floats;
  o.row_step = v.shape.h == 1 && out.h > 1 ? 0 : v.shape.w * v.pitch;
  o.pixel_step = v.shape.w == 1 && out.w > 1 ? 0 : v.pitch;
  o.one_channel = v.shape.c == 1 && out.c > 1;
  return o;
}

// Scale, then shift. Constants that vary within channels change from (C, H, W) to pixels of padded channels.
void pack_scale_shift(const OpSpec& op, const Shape& shape, int64_t pitch, Buffer& weights) {
  const int64_t area = static_cast<int64_t>(op.weight.size()) / shape.c, half = area * pitch;
  weights = Buffer(2 * half);
  for (int64_t c = 0; c < shape.c; ++c)
    for (int64_t p = 0; p < area; ++p) {
      weights.data()[p * pitch + c] = op.weight[c * area + p];
      weights.data()[half + p * pitch + c] = op.bias[c * area + p];
    }
}

}  // namespace

Pool pool_arguments(const OpSpec& op, const Value& in, const Value& out) {
  Pool c{};
  c.is_max = op.is_max;
  c.include_padding = op.include_padding;
  c.rows = pool_axis(op, 0, in.shape.h, out.shape.h);
  c.columns = pool_axis(op, 1, in.shape.w, out.shape.w);
  c.pitch = out.pitch;
  return c;
}

ChannelOp channel_arguments(const OpSpec& op, const Value& in, const Value& out, Buffer& weights) {
  ChannelOp c{};
  c.channels = in.shape.c;
  c.in_pitch = in.pitch;
  c.pitch = out.pitch;
  c.parts = op.parts;
  c.is_max = op.is_max;
  c.eps = op.value;
  if (op.kind != OpKind::layer_norm) return c;
  pack_scale_shift(op, in.shape, out.pitch, weights);
  c.scale = weights.data();
  c.shift = c.scale + out.pitch;
  return c;
}

Elementwise elementwise_arguments(const OpSpec& op, const Value& in, const Value* other, const Value& out,
                                  Buffer& weights) {
  Elementwise c{};
  c.combine = op.kind == OpKind::add           ? Combine::add
              : op.kind == OpKind::multiply    ? Combine::multiply
              : op.kind == OpKind::scale_shift ? Combine::scale_shift
                                               : Combine::none;
  c.a = operand(in, out.shape);
  if (other) c.b = operand(*other, out.shape);
  c.height = out.shape.h;
  c.width = out.shape.w;
  c.channels = out.shape.c;
  c.pitch = out.pitch;
  c.activation = op.activation;
  if (c.combine != Combine::scale_shift) return c;
  pack_scale_shift(op, in.shape, out.pitch, weights);
  const int64_t half = weights.size() / 2;
  if (half > out.pitch) c.b = {nullptr, 0, out.shape.w * out.pitch, out.pitch, false};
  c.b.data = weights.data();
  c.shift = c.b.data + half;
  return c;
}

}  // namespace fastcascade
