#include "step_builder.h"

#include <algorithm>
#include <map>

#include "fusion.h"
#include "int8_steps.h"
#include "kernel_choice.h"
#include "operation_text.h"
#include "pack.h"
#include "resize_lines.h"
#include "step_arguments.h"

namespace fastcascade {
namespace {

constexpr int64_t kPackedChannels = 4;  // of an image as bytes
constexpr int64_t kMinPixels = 32;      // of a thread's share of a convolution, unless it takes all pixels

// The kernel's pixels, or its rows where columns are joined.
std::vector<Tap> taps_of(const OpSpec& op, const Value& in, bool joins_columns) {
  std::vector<Tap> taps;
  for (int64_t y = 0; y < op.kernel[0]; ++y)
    for (int64_t x = 0; x < (joins_columns ? 1 : op.kernel[1]); ++x)
      taps.push_back({(y * op.dilation[0] * in.shape.w + x * op.dilation[1]) * in.pitch, y, x});
  return taps;
}

class StepBuilder {
 public:
  StepBuilder(const StageSpec& spec, const std::vector<Shape>& shapes, const std::vector<bool>& bytes,
              const KernelTable& kernels, const Int8Kernels* int8_kernels, const Bf16Kernels* bf16_kernels,
              const std::string& forced)
      : spec_(spec), kernels_(kernels), forced_(forced) {
    net_.name = spec.name;
    net_.kernels = &kernels;
    net_.int8_kernels = int8_kernels;
    net_.bf16_kernels = bf16_kernels;
    net_.input_kind = spec.input_kind;
    net_.features = spec.keeps_features ? spec.features : -1;
    net_.logits = spec.logits;
    for (size_t v = 0; v < shapes.size(); ++v) add_value(shapes[v], bytes[v]);
  }

  Network build() {
    if (!net_.reads_previous()) pack_image();
    add_load();
    for (const OpSpec& op : spec_.ops) add_op(op);
    return std::move(net_);
  }

 private:
  const StageSpec& spec_;
  const KernelTable& kernels_;
  const std::string forced_;
  Network net_;
  std::map<int64_t, int64_t> rounded_;  // values that have been rounded to bf16, and the results

  int64_t add_value(const Shape& shape, bool bytes = false) {
    Value value;
    value.shape = shape;
    value.bytes = bytes;
    value.set_pitch(round_up(shape.c, kernels_.lanes));
    net_.values.push_back(value);
    return static_cast<int64_t>(net_.values.size()) - 1;
  }

  ConvKernel conv_kernel(const OpSpec& op) const {
    if (op.max_pooled) return ConvKernel::winograd;
    return choose_conv_kernel(op, net_.shape(op.inputs[0]), net_.shape(op.output), kernels_, forced_);
  }

  // An image has few channels. Direct convolutions need no padded ones; products of bytes take them by fours.
  void pack_image() {
    if (only_read_by(0, [this](const OpSpec& op) { return is_direct(op); }))
      return net_.values[0].set_pitch(net_.shape(0).c);
    const auto is_packed = [this](const OpSpec& op) {
      const auto is_product = [](const OpSpec& reader) { return reader.kind == OpKind::int8_conv2d; };
      return op.kind == OpKind::quantize && only_read_by(op.output, is_product);
    };
    if (!only_read_by(0, is_packed)) return;
    const int64_t pitch = round_up(net_.shape(0).c, kPackedChannels);
    net_.values[0].set_pitch(pitch);
    for (const OpSpec& op : spec_.ops)
      if (op.kind == OpKind::quantize && op.inputs[0] == 0) net_.values[op.output].set_pitch(pitch);
  }

  bool is_direct(const OpSpec& op) const { return op.kind == OpKind::conv2d && conv_kernel(op) == ConvKernel::direct; }

  template <class Test>
  bool only_read_by(int64_t value, Test test) const {
    for (const OpSpec& op : spec_.ops) {
      if (op.residual == value) return false;
      if (std::count(op.inputs.begin(), op.inputs.end(), value) > 0 && !test(op)) return false;
    }
    return !spec_.is_result(value);
  }

  Step& add_step(StepKind kind, const OpSpec& op, const std::string& operation, const std::string& kernel) {
    net_.steps.emplace_back();
    Step& step = net_.steps.back();
    const Shape& out = net_.shape(op.output);
    step.kind = kind;
    step.inputs = op.inputs;
    step.output = op.output;
    step.residual = op.residual;
    step.operation = operation + " -> " + out.text();
    step.kernel = kernel;
    step.work_items = out.h * out.w;
    step.macs = out.size() * op.weight_shape[1] * op.weight_shape[2] * op.weight_shape[3];
    return step;
  }

  void add_load() {
    OpSpec op;
    op.output = 0;
    Step& step = add_step(StepKind::load, op, net_.reads_previous() ? "read features" : "read image", "load_f32");
    step.work_items = net_.shape(0).h;
  }

  // A function that may leave the finite numbers is a step of its own, which clears the padded channels.
  void add_op(const OpSpec& op) {
    const bool sums = op.kind == OpKind::conv2d || op.kind == OpKind::linear;
    if (!sums || stays_finite(op.activation.function)) return add_whole_op(op);
    OpSpec sum = op, function;
    sum.activation = Activation();
    sum.output = add_value(net_.shape(op.output));
    function.activation = op.activation;
    function.inputs = {sum.output};
    function.output = op.output;
    add_whole_op(sum);
    add_elementwise(function);
  }

  void add_whole_op(const OpSpec& op) {
    switch (op.kind) {
      case OpKind::conv2d:
        switch (conv_kernel(op)) {
          case ConvKernel::winograd: return add_winograd(op);
          case ConvKernel::depthwise: return add_depthwise(op);
          case ConvKernel::direct: return add_direct(op);
        }
        return;
      case OpKind::linear: return add_direct(op);
      case OpKind::pool:
      case OpKind::adaptive_pool: return add_pool(op);
      case OpKind::add:
      case OpKind::multiply:
      case OpKind::activation:
      case OpKind::scale_shift: return add_elementwise(op);
      case OpKind::layer_norm: return add_channel_op(StepKind::layer_norm, op, "layer_norm_f32");
      case OpKind::softmax: return add_channel_op(StepKind::softmax, op, "softmax_f32");
      case OpKind::channel_reduce: return add_channel_op(StepKind::channel_reduce, op, "channel_reduce_f32");
      case OpKind::resize: return add_resize(op);
      case OpKind::reorder: return add_layout(StepKind::reorder, op, "reorder_f32");
      case OpKind::reshape: return add_layout(StepKind::reshape, op, "reshape_f32");
      case OpKind::slice: return add_layout(StepKind::slice, op, "slice_f32");
      case OpKind::pad: return add_layout(StepKind::pad, op, "pad_f32");
      case OpKind::concat: return add_layout(StepKind::concat, op, "concat_f32");
      case OpKind::flatten: return add_layout(StepKind::flatten, op, "flatten_f32");
      case OpKind::quantize: return add_grid(StepKind::quantize, op, "quantize_f32");
      case OpKind::dequantize: return add_grid(StepKind::dequantize, op, "dequantize_u8");
      case OpKind::int8_conv2d:
      case OpKind::int8_linear: return add_int8_layer(op);
    }
  }

  void add_layout(StepKind kind, const OpSpec& op, const char* kernel) {
    Step& step = add_step(kind, op, operation_text(op, net_.shape(op.inputs[0])), kernel);
    step.layout = op;
    if (kind == StepKind::flatten) step.work_items = 1;
  }

  // The bias is stored in the step.
  Epilogue epilogue(Step& step, const OpSpec& op) {
    step.bias = op.bias;
    step.bias.resize(net_.values[op.output].pitch, 0.f);
    return {step.bias.data(), op.activation, op.residual_after_activation, nullptr, nullptr};
  }

  static ConvGeometry geometry(const OpSpec& op, const Value& in, const Value& out) {
    return {op.kernel[0],  op.kernel[1], op.stride[0], op.stride[1], op.dilation[0], op.dilation[1], op.padding[0],
            op.padding[2], in.shape.h,   in.shape.w,   in.pitch,     out.shape.h,    out.shape.w,    out.pitch};
  }

  // Not layers that read the image or make the logits, and not groups of odd numbers of channels, whose last pair would
  // reach into the next group.
  bool multiplies_in_bf16(const OpSpec& op, const MergedWeights& merged) const {
    const bool reads_image = op.inputs[0] == 0 && net_.input_kind == StageInput::image;
    const bool has_pairs = merged.groups == 1 || merged.in % 2 == 0;
    return net_.bf16_kernels && has_pairs && !reads_image && op.output != net_.logits;
  }

  // A value rounded to bf16, once for all layers that read it.
  int64_t rounded(int64_t value) {
    const auto known = rounded_.find(value);
    if (known != rounded_.end()) return known->second;
    const Value in = net_.values[value];
    OpSpec op;
    op.inputs = {value};
    op.output = rounded_[value] = add_value(in.shape);
    Value& out = net_.values[op.output];
    out.set_pitch(out.pitch / 2);
    add_step(StepKind::round_bf16, op, "round to bf16", "round_bf16").rounding = {nullptr, nullptr, in.shape.c,
                                                                                  in.pitch, out.pitch};
    return op.output;
  }

  void add_direct(const OpSpec& op) {
    const MergedWeights merged = merge_groups(op, kernels_.lanes);
    const bool in_bf16 = multiplies_in_bf16(op, merged);
    const int64_t input = in_bf16 ? rounded(op.inputs[0]) : op.inputs[0], per_term = in_bf16 ? 2 : 1;
    const Value in = net_.values[input], out = net_.values[op.output];
    const std::string kernel = op.kind == OpKind::linear ? "linear" : "conv_direct";
    Step& step = add_step(in_bf16 ? StepKind::direct_bf16 : StepKind::direct, op, operation_text(op, in.shape),
                          kernel + (in_bf16 ? "_bf16" : "_f32"));
    step.inputs = {input};
    DirectConv& c = step.direct;
    ConvGeometry& g = c.geometry;
    g = geometry(op, in, out);
    const bool keeps_map = in.shape.h == out.shape.h && in.shape.w == out.shape.w;
    if (keeps_map && g.kernel_h * g.kernel_w * g.stride_h * g.stride_w == 1) {
      g.in_height = g.height = out.shape.h * out.shape.w;
      g.in_width = g.width = 1;
    }
    // Without padded channels, the pixels under one row of the kernel are consecutive terms.
    c.joins_columns = g.kernel_w > 1 && merged.groups == 1 && op.dilation[1] == 1 && in.pitch * per_term == in.shape.c;
    c.group_channels = round_up(merged.in, per_term) / per_term;
    c.depth = c.joins_columns ? merged.kw * c.group_channels : c.group_channels;
    step.weights = in_bf16 ? pack_direct_bf16(merged, kernels_.lanes) : pack_direct(merged, kernels_.lanes);
    c.weights = step.weights.data();
    step.taps = taps_of(op, in, c.joins_columns);
    c.taps = step.taps.data();
    c.tap_count = static_cast<int64_t>(step.taps.size());
    c.blocks_per_group = out.pitch / kernels_.lanes / merged.groups;
    c.epilogue = epilogue(step, op);
    step.work_items = g.height;
    step.min_items = std::max<int64_t>(1, kMinPixels / g.width);
    step.panels = merged.groups * panel_count(c.blocks_per_group);
  }

  void add_winograd(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    const MergedWeights merged = merge_groups(op, kernels_.lanes);
    Step& step = add_step(StepKind::winograd, op, operation_text(op, in.shape), "conv3x3_winograd_f32");
    WinogradWeights packed = pack_winograd(merged, kernels_);
    step.weights = std::move(packed.transformed);
    step.untransformed_weights = std::move(packed.untransformed);
    Winograd& c = step.winograd;
    c.pools = op.max_pooled;
    c.height = in.shape.h + op.padding[0] + op.padding[1] - 2;
    c.width = in.shape.w + op.padding[2] + op.padding[3] - 2;
    step.work_items = ((c.height + 3) / 4) * ((c.width + 3) / 4);
    step.min_items = kernels_.mr;
    step.macs = c.height * c.width * out.shape.c * op.weight_shape[1] * 9;
    c.weights = step.weights.data();
    c.in_height = in.shape.h;
    c.in_width = in.shape.w;
    c.in_pitch = in.pitch;
    c.channels = merged.in;
    c.group_in_pitch = in.pitch / merged.groups;
    c.group_pitch = out.pitch / merged.groups;
    step.panels = merged.groups * (round_up(c.group_pitch, kernels_.nr()) / kernels_.nr());
    c.out_height = out.shape.h;
    c.out_width = out.shape.w;
    c.pitch = out.pitch;
    c.pad_top = op.padding[0];
    c.pad_left = op.padding[2];
    c.epilogue = epilogue(step, op);
  }

  void add_depthwise(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    Step& step = add_step(StepKind::depthwise, op, operation_text(op, in.shape), "conv_depthwise_f32");
    step.weights = pack_depthwise(op, kernels_.lanes);
    step.work_items = out.shape.h;
    step.min_items = std::max<int64_t>(1, kMinPixels / out.shape.w);
    step.panels = out.pitch / kernels_.lanes;
    DepthwiseConv& c = step.depthwise;
    c.weights = step.weights.data();
    c.geometry = geometry(op, in, out);
    c.epilogue = epilogue(step, op);
  }

  void add_pool(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    if (in.bytes) {
      add_step(StepKind::int8_pool, op, operation_text(op, in.shape), "pool_max_u8").int8.pool =
          int8_pool_arguments(op, in, out);
      return;
    }
    const char* kernel = op.is_max ? "pool_max_f32" : "pool_average_f32";
    Step& step = add_step(StepKind::pool, op, operation_text(op, in.shape), kernel);
    step.pool = pool_arguments(op, in, out);
    step.min_items = kMinPixels;
    step.panels = out.pitch / kernels_.lanes;
  }

  void add_int8_layer(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    const Int8Kernels& kernels = *net_.int8_kernels;
    const StepKind kind = int8_step_kind(op, in.shape, kernels, kernels_.lanes);
    const std::string name = kInt8Prefix + std::string(kernels.isa);
    const bool winograd = kind == StepKind::int8_winograd;
    Step& step = add_step(kind, op, operation_text(op, in.shape), winograd ? name + "_winograd" : name);
    step.min_items = kMinPixels;
    pack_int8_layer(step, op, in, out, kernels_.lanes, kernels);
  }

  void add_grid(StepKind kind, const OpSpec& op, const char* kernel) {
    const Value in = net_.values[op.inputs[0]];
    Step& step = add_step(kind, op, operation_text(op, in.shape), kernel);
    step.int8.grid = {op.int8.scale, static_cast<int32_t>(op.int8.zero_point), in.shape.h * in.shape.w, in.pitch};
  }

  void add_elementwise(const OpSpec& op) {
    Step& step = add_step(StepKind::elementwise, op, operation_text(op, net_.shape(op.inputs[0])), "elementwise_f32");
    const Value* other = op.inputs.size() > 1 ? &net_.values[op.inputs[1]] : nullptr;
    step.elementwise =
        elementwise_arguments(op, net_.values[op.inputs[0]], other, net_.values[op.output], step.weights);
  }

  void add_channel_op(StepKind kind, const OpSpec& op, const char* kernel) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    Step& step = add_step(kind, op, operation_text(op, in.shape), kernel);
    step.channel_op = channel_arguments(op, in, out, step.weights);
  }

  void add_resize(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    Step& step = add_step(StepKind::resize, op, operation_text(op, in.shape), "resize_f32");
    step.rows = resize_lines(op, in.shape.h, out.shape.h);
    step.columns = resize_lines(op, in.shape.w, out.shape.w);
    Resize& c = step.resize;
    c.rows = {step.rows.data(), static_cast<int64_t>(step.rows.size()) / out.shape.h};
    c.columns = {step.columns.data(), static_cast<int64_t>(step.columns.size()) / out.shape.w};
    c.in_height = in.shape.h;
    c.in_width = in.shape.w;
    c.height = out.shape.h;
    c.width = out.shape.w;
    c.pitch = out.pitch;
  }
};

}  // namespace

Network build_steps(const StageSpec& spec, const std::vector<Shape>& shapes, const std::vector<bool>& bytes,
                    const KernelTable& kernels, const Int8Kernels* int8_kernels, const Bf16Kernels* bf16_kernels,
                    const std::string& forced) {
  return StepBuilder(spec, shapes, bytes, kernels, int8_kernels, bf16_kernels, forced).build();
}

}  // namespace fastcascade
