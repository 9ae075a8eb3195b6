#include "shapes.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fastcascade {
namespace {

// Like kMaxFloats: above what real networks have, too small to overflow.
constexpr int64_t kMaxSide = int64_t{1} << 16, kMaxChannels = int64_t{1} << 20;
constexpr size_t kMaxOps = 100000;

[[noreturn]] void fail(const std::string& where, const std::string& what) {
  throw std::invalid_argument(where + ": " + what);
}

void check_range(const std::string& where, const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(where, std::string(name) + " is " + std::to_string(value) + ", expected " + std::to_string(low) + " to " +
                    std::to_string(high));
}

void check_shape(const std::string& where, const Shape& s) {
  check_range(where, "channels", s.c, 1, kMaxChannels);
  check_range(where, "height", s.h, 1, kMaxSide);
  check_range(where, "width", s.w, 1, kMaxSide);
  if (s.size() > kMaxFloats) fail(where, "value " + s.text() + " is too large");
}

void check_count(const std::string& where, const char* name, size_t got, int64_t expected) {
  if (static_cast<int64_t>(got) != expected)
    fail(where, std::string(name) + " has " + std::to_string(got) + " numbers, expected " + std::to_string(expected));
}

void check_same(const std::string& where, const Shape& a, const Shape& b) {
  if (!(a == b)) fail(where, "adds a value of shape " + b.text() + " to one of shape " + a.text());
}

void check_windows(const std::string& where, const OpSpec& op) {
  for (int axis = 0; axis < 2; ++axis) {
    check_range(where, "kernel", op.kernel[axis], 1, kMaxSide);
    check_range(where, "stride", op.stride[axis], 1, kMaxSide);
    check_range(where, "dilation", op.dilation[axis], 1, kMaxSide);
  }
  for (int64_t p : op.padding) check_range(where, "padding", p, 0, kMaxSide);
}

int64_t count_windows(const std::string& where, int64_t size, int64_t before, int64_t after, int64_t extent,
                      int64_t stride, bool ceil_mode) {
  const int64_t room = size + before + after - extent;
  if (room < 0)
    fail(where,
         "a window of " + std::to_string(extent) + " does not fit a padded size of " + std::to_string(room + extent));
  int64_t count = room / stride + 1;
  // A window that ceil_mode adds must start inside the image or its leading padding.
  if (ceil_mode && room % stride && count * stride < size + before) ++count;
  return count;
}

Shape conv_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  check_windows(where, op);
  const auto& w = op.weight_shape;
  check_range(where, "output channels", w[0], 1, kMaxChannels);
  check_range(where, "groups", op.groups, 1, in.c);
  if (in.c % op.groups || w[0] % op.groups || w[1] != in.c / op.groups || w[2] != op.kernel[0] || w[3] != op.kernel[1])
    fail(where, "weights of shape (" + std::to_string(w[0]) + ", " + std::to_string(w[1]) + ", " +
                    std::to_string(w[2]) + ", " + std::to_string(w[3]) + ") do not fit an input of " + in.text() +
                    " in " + std::to_string(op.groups) + " groups");
  if (w[1] * w[2] * w[3] > kMaxFloats / w[0]) fail(where, "the weights are too large");
  check_count(where, "weight", op.weight.size(), w[0] * w[1] * w[2] * w[3]);
  check_count(where, "bias", op.bias.size(), w[0]);
  // Kernels read an input that carries its padding, so that must be a value like others.
  check_shape(where, {in.c, in.h + op.padding[0] + op.padding[1], in.w + op.padding[2] + op.padding[3]});
  const int64_t tall = (op.kernel[0] - 1) * op.dilation[0] + 1, wide = (op.kernel[1] - 1) * op.dilation[1] + 1;
  return {w[0], count_windows(where, in.h, op.padding[0], op.padding[1], tall, op.stride[0], false),
          count_windows(where, in.w, op.padding[2], op.padding[3], wide, op.stride[1], false)};
}

Shape pool_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  check_windows(where, op);
  for (int axis = 0; axis < 2; ++axis)
    if (2 * std::max(op.padding[2 * axis], op.padding[2 * axis + 1]) > op.kernel[axis])
      fail(where, "padding is more than half of the window");
  return {in.c, count_windows(where, in.h, op.padding[0], op.padding[1], op.kernel[0], op.stride[0], op.ceil_mode),
          count_windows(where, in.w, op.padding[2], op.padding[3], op.kernel[1], op.stride[1], op.ceil_mode)};
}

Shape linear_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  const auto& w = op.weight_shape;
  if (in.h != 1 || in.w != 1 || w[1] != in.c)
    fail(where, "a linear layer of " + std::to_string(w[1]) + " inputs reads a value of shape " + in.text());
  check_range(where, "outputs", w[0], 1, kMaxChannels);
  if (w[0] > kMaxFloats / in.c) fail(where, "the weights are too large");
  check_count(where, "weight", op.weight.size(), w[0] * in.c);
  check_count(where, "bias", op.bias.size(), w[0]);
  return {w[0], 1, 1};
}

Shape slice_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  const int64_t sizes[3] = {in.c, in.h, in.w};
  int64_t out[3];
  for (int axis = 0; axis < 3; ++axis) {
    // A step of -1 is a mirror image: the whole axis backwards, from its end to before its beginning.
    if (op.step[axis] == -1 && op.start[axis] == sizes[axis] - 1 && op.stop[axis] == -1) {
      out[axis] = sizes[axis];
      continue;
    }
    check_range(where, "slice start", op.start[axis], 0, sizes[axis] - 1);
    check_range(where, "slice stop", op.stop[axis], op.start[axis] + 1, sizes[axis]);
    check_range(where, "slice step", op.step[axis], 1, kMaxChannels);
    out[axis] = (op.stop[axis] - op.start[axis] + op.step[axis] - 1) / op.step[axis];
  }
  return {out[0], out[1], out[2]};
}

Shape pad_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  for (int axis = 0; axis < 3; ++axis) {
    check_range(where, "padding", op.before[axis], 0, kMaxChannels);
    check_range(where, "padding", op.after[axis], 0, kMaxChannels);
  }
  if (op.pad_mode != PadMode::constant) {
    check_range(where, "channel padding", op.before[0] + op.after[0], 0, 0);
    // A reflection does not repeat the border.
    if (op.pad_mode == PadMode::reflect) {
      check_range(where, "reflected rows", std::max(op.before[1], op.after[1]), 0, in.h - 1);
      check_range(where, "reflected columns", std::max(op.before[2], op.after[2]), 0, in.w - 1);
    }
  }
  return {in.c + op.before[0] + op.after[0], in.h + op.before[1] + op.after[1], in.w + op.before[2] + op.after[2]};
}

Shape concat_shape(const std::string& where, const OpSpec& op, const std::vector<Shape>& shapes) {
  Shape out = shapes[op.inputs[0]];
  for (size_t i = 1; i < op.inputs.size(); ++i) {
    const Shape& next = shapes[op.inputs[i]];
    if (next.h != out.h || next.w != out.w) fail(where, "joins values of shapes " + out.text() + " and " + next.text());
    out.c += next.c;
    check_range(where, "channels", out.c, 1, kMaxChannels);
  }
  return out;
}

int64_t broadcast_size(const std::string& where, const Shape& a, const Shape& b, int64_t m, int64_t n) {
  if (m != n && m != 1 && n != 1)
    fail(where, "combines values of shapes " + a.text() + " and " + b.text() +
                    "; expected equal sizes, or 1, along each axis");
  return std::max(m, n);
}

Shape broadcast_shape(const std::string& where, const Shape& a, const Shape& b) {
  return {broadcast_size(where, a, b, a.c, b.c), broadcast_size(where, a, b, a.h, b.h),
          broadcast_size(where, a, b, a.w, b.w)};
}

Shape resized_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  check_range(where, "height", op.size.h, 1, kMaxSide);
  check_range(where, "width", op.size.w, 1, kMaxSide);
  const bool antialiases = op.interpolation != Interpolation::nearest && !op.align_corners;
  if (op.interpolation == Interpolation::bicubic ? !op.antialias : op.antialias && !antialiases)
    fail(where, "resizes in a way that has no kernel");
  return {in.c, op.size.h, op.size.w};
}

Shape reshaped_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  check_shape(where, op.size);
  if (op.size.size() != in.size()) fail(where, "reshapes a value of shape " + in.text() + " to " + op.size.text());
  return op.size;
}

Shape reordered_shape(const std::string& where, const OpSpec& op, const Shape& in) {
  check_range(where, "channels", static_cast<int64_t>(op.channels.size()), 1, kMaxChannels);
  for (int64_t c : op.channels) check_range(where, "channel", c, 0, in.c - 1);
  return {static_cast<int64_t>(op.channels.size()), in.h, in.w};
}

// Scale and shift have one number per channel or, where `varies` allows it, one per element.
void check_scale_shift(const std::string& where, const OpSpec& op, const Shape& in, bool varies) {
  const bool per_element = varies && static_cast<int64_t>(op.weight.size()) == in.size();
  check_count(where, "scale", op.weight.size(), per_element ? in.size() : in.c);
  check_count(where, "shift", op.bias.size(), per_element ? in.size() : in.c);
}

Shape infer(const std::string& where, const OpSpec& op, const std::vector<Shape>& shapes) {
  const Shape& in = shapes[op.inputs[0]];
  switch (op.kind) {
    case OpKind::conv2d:
    case OpKind::int8_conv2d: return conv_shape(where, op, in);
    case OpKind::pool: return pool_shape(where, op, in);
    case OpKind::linear:
    case OpKind::int8_linear: return linear_shape(where, op, in);
    case OpKind::adaptive_pool:
    case OpKind::resize: return resized_shape(where, op, in);
    case OpKind::add:
    case OpKind::multiply: return broadcast_shape(where, in, shapes[op.inputs[1]]);
    case OpKind::activation:
    case OpKind::quantize:
    case OpKind::dequantize: return in;
    case OpKind::scale_shift: check_scale_shift(where, op, in, true); return in;
    case OpKind::layer_norm: check_scale_shift(where, op, in, false); return in;
    case OpKind::softmax:
      check_range(where, "parts", op.parts, 1, in.c);
      if (in.c % op.parts) fail(where, "a softmax over " + std::to_string(op.parts) + " parts reads " + in.text());
      return in;
    case OpKind::channel_reduce: return {1, in.h, in.w};
    case OpKind::reorder: return reordered_shape(where, op, in);
    case OpKind::reshape: return reshaped_shape(where, op, in);
    case OpKind::slice: return slice_shape(where, op, in);
    case OpKind::pad: return pad_shape(where, op, in);
    case OpKind::concat: return concat_shape(where, op, shapes);
    case OpKind::flatten: return {in.size(), 1, 1};
  }
  fail(where, "unknown operation");
}

// Zero points are bytes; a kernel may rely on rounded outputs being bytes, and on sums fitting in an int32.
void check_zero_point(const std::string& where, int64_t zero_point) {
  if (zero_point < 0 || zero_point > 255)
    fail(where, "the zero point is " + std::to_string(zero_point) + ", expected 0 to 255");
}

void check_byte_weights(const std::string& where, const OpSpec& op) {
  const size_t terms = op.weight.size() / static_cast<size_t>(op.weight_shape[0]);
  for (size_t first = 0; first < op.weight.size(); first += terms) {
    double sum = 0;
    for (size_t i = first; i < first + terms; ++i) {
      if (!(std::fabs(op.weight[i]) <= 127.f)) fail(where, "a weight is beyond -127 to 127");
      sum += std::fabs(op.weight[i]);
    }
    if (255 * sum > std::numeric_limits<int32_t>::max()) fail(where, "its sums do not fit in 32 bits");
  }
}

void check_byte_layer(const std::string& where, const OpSpec& op) {
  const Int8Spec& s = op.int8;
  check_count(where, "multiplier", s.multiplier.size(), op.weight_shape[0]);
  for (const std::vector<float>* numbers : {&s.multiplier, &op.bias})
    for (const float x : *numbers)
      if (!std::isfinite(x)) fail(where, "a multiplier or bias is not finite");
  check_zero_point(where, s.zero_point);
  check_zero_point(where, s.residual_zero_point);
  if (!std::isfinite(s.residual_scale)) fail(where, "the scale of the residual is not finite");
  const int64_t zero_point = s.output_zero_point.value_or(0);
  check_zero_point(where, zero_point);
  const bool is_free = !s.output_zero_point;
  const auto lowest = static_cast<float>(-zero_point), highest = static_cast<float>(255 - zero_point);
  if (!(s.low <= s.high) || (!is_free && !(lowest <= s.low && s.high <= highest)))
    fail(where, "the output is clamped to " + std::to_string(s.low) + " to " + std::to_string(s.high));
  check_byte_weights(where, op);
}

void check_grid(const std::string& where, const Int8Spec& s) {
  check_zero_point(where, s.zero_point);
  if (!(s.scale > 0.f) || std::isinf(s.scale)) fail(where, "the scale is " + std::to_string(s.scale));
}

}  // namespace

std::vector<bool> infer_bytes(const StageSpec& spec, size_t values) {
  std::vector<bool> bytes(values, false);
  const std::string stage = "stage '" + spec.name + "'";
  for (size_t i = 0; i < spec.ops.size(); ++i) {
    const OpSpec& op = spec.ops[i];
    const std::string where = stage + ", operation " + std::to_string(i);
    const bool is_layer = op.kind == OpKind::int8_conv2d || op.kind == OpKind::int8_linear;
    const bool passes = op.kind == OpKind::pool && op.is_max, reads = bytes[op.inputs[0]];
    std::vector<int64_t> all = op.inputs;
    if (op.residual >= 0) all.push_back(op.residual);
    for (const int64_t v : all)
      if (!passes && bytes[v] != (is_layer || op.kind == OpKind::dequantize))
        fail(where, "reads " + std::string(bytes[v] ? "bytes" : "float32") + ", which it cannot");
    if (is_layer) check_byte_layer(where, op);
    if (op.kind == OpKind::quantize || op.kind == OpKind::dequantize) check_grid(where, op.int8);
    bytes[op.output] = op.kind == OpKind::quantize || (is_layer && op.int8.output_zero_point) || (passes && reads);
  }
  if (bytes[spec.features] || bytes[spec.logits]) fail(stage, "ends in bytes, expected float32");
  return bytes;
}

std::vector<Shape> infer_shapes(const StageSpec& spec) {
  const std::string stage = "stage '" + spec.name + "'";
  if (spec.ops.size() > kMaxOps) fail(stage, "has too many operations");
  check_shape(stage, spec.input);
  const int64_t count = static_cast<int64_t>(spec.ops.size()) + 1;
  std::vector<Shape> shapes(count);
  std::vector<bool> known(count, false);
  shapes[0] = spec.input;
  known[0] = true;
  for (size_t i = 0; i < spec.ops.size(); ++i) {
    const OpSpec& op = spec.ops[i];
    const std::string where = stage + ", operation " + std::to_string(i);
    const size_t arity = op.kind == OpKind::add || op.kind == OpKind::multiply ? 2 : 1;
    if (op.inputs.size() < arity || op.inputs.size() > kMaxInputs ||
        (op.kind != OpKind::concat && op.inputs.size() != arity))
      fail(where, "has " + std::to_string(op.inputs.size()) + " inputs");
    std::vector<int64_t> reads = op.inputs;
    if (op.residual >= 0) reads.push_back(op.residual);
    for (int64_t v : reads)
      if (v < 0 || v >= count || !known[v]) fail(where, "reads value " + std::to_string(v) + " before it is written");
    if (op.output < 1 || op.output >= count || known[op.output])
      fail(where, "writes value " + std::to_string(op.output) + ", which is taken or out of range");
    shapes[op.output] = infer(where, op, shapes);
    check_shape(where, shapes[op.output]);
    if (op.residual >= 0) check_same(where, shapes[op.output], shapes[op.residual]);
    known[op.output] = true;
  }
  for (int64_t v : {spec.features, spec.logits})
    if (v < 0 || v >= count || !known[v]) fail(stage, "ends in value " + std::to_string(v) + ", which is not written");
  return shapes;
}

}  // namespace fastcascade
