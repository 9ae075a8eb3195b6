#include "run_step.h"

#include "int8_steps.h"
#include "layout_steps.h"

namespace fastcascade {
namespace {

void set_residual(Epilogue& e, const float* residual) {
  const bool comes_last = e.residual_after_activation && e.activation.is_function();
  (comes_last ? e.residual_after_function : e.residual) = residual;
}

}  // namespace

void run_step(const Network& net, const Step& step, const Source& source, float* arena, float* scratch, int64_t first,
              StepPart part) {
  const auto at = [&](int64_t v) {
    const Value& value = net.values[v];
    return arena + value.offset + (value.holds_tile ? first * value.floats : 0);
  };
  const KernelTable& kernels = *net.kernels;
  const float* x = step.inputs.empty() ? nullptr : at(step.inputs[0]);
  const float* residual = step.residual < 0 ? nullptr : at(step.residual);
  float* y = at(step.output);
  int32_t* invalid = net.invalid_offset < 0 ? nullptr : reinterpret_cast<int32_t*>(arena + net.invalid_offset) + first;
  const auto channel_op = [&] {
    ChannelOp c = step.channel_op;
    c.input = x;
    c.output = y;
    return c;
  };
  switch (step.kind) {
    case StepKind::load:
      for (int64_t n = part.positions.begin / step.work_items; n * step.work_items < part.positions.end; ++n) {
        const int64_t above = n * step.work_items;  // lines of the instances before
        if (invalid && part.positions.begin <= above) invalid[n] = 0;
        load_lines(net, source, first + n, y + n * net.values[0].floats,
                   {std::max<int64_t>(0, part.positions.begin - above),
                    std::min(step.work_items, part.positions.end - above)});
      }
      return;
    case StepKind::direct:
    case StepKind::direct_bf16: {
      DirectConv c = step.direct;
      c.input = x;
      c.output = y;
      set_residual(c.epilogue, residual);
      const bool is_f32 = step.kind == StepKind::direct;
      const auto conv_direct = is_f32 ? kernels.conv_direct_f32 : net.bf16_kernels->conv_direct;
      return conv_direct(c, part.positions, part.panels);
    }
    case StepKind::round_bf16: {
      Bf16Rounding c = step.rounding;
      c.input = x;
      c.output = y;
      return net.bf16_kernels->round(c, part.positions);
    }
    case StepKind::winograd: {
      Winograd c = step.winograd;
      c.input = x;
      c.output = y;
      c.scratch = scratch;
      set_residual(c.epilogue, residual);
      return kernels.conv3x3_winograd_f32(c, part.positions, part.panels);
    }
    case StepKind::depthwise: {
      DepthwiseConv c = step.depthwise;
      c.input = x;
      c.output = y;
      set_residual(c.epilogue, residual);
      return kernels.conv_depthwise_f32(c, part.positions, part.panels);
    }
    case StepKind::pool: {
      Pool c = step.pool;
      c.input = x;
      c.output = y;
      return kernels.pool_f32(c, part.positions, part.panels);
    }
    case StepKind::elementwise: {
      Elementwise c = step.elementwise;
      c.a.data = x;
      // Constants are set; an operand that the kernel does not use points at what may be read.
      if (c.combine != Combine::scale_shift) c.shift = c.b.data = step.inputs.size() > 1 ? at(step.inputs[1]) : x;
      c.output = y;
      return kernels.elementwise_f32(c, part.positions);
    }
    case StepKind::layer_norm: return kernels.layer_norm_f32(channel_op(), part.positions);
    case StepKind::softmax: return kernels.softmax_f32(channel_op(), part.positions);
    case StepKind::channel_reduce: return kernels.channel_reduce_f32(channel_op(), part.positions);
    case StepKind::resize: {
      Resize c = step.resize;
      c.input = x;
      c.output = y;
      return kernels.resize_f32(c, part.positions);
    }
    case StepKind::reorder: return reorder_f32(net, step, x, y, part.positions);
    case StepKind::reshape: return reshape_f32(net, step, x, y, part.positions);
    case StepKind::pad: return pad_f32(net, step, x, y, part.positions);
    case StepKind::slice: return slice_f32(net, step, x, y, part.positions);
    case StepKind::flatten: return flatten_f32(net, step, x, y, part.positions);
    case StepKind::quantize:
    case StepKind::dequantize:
    case StepKind::int8_conv:
    case StepKind::int8_winograd:
    case StepKind::int8_depthwise:
    case StepKind::int8_pool:
      return run_int8_step(net, step, {x, residual, y, scratch, invalid}, part.positions, part.panels);
    case StepKind::concat: {
      const float* inputs[kMaxInputs];
      for (size_t i = 0; i < step.inputs.size(); ++i) inputs[i] = at(step.inputs[i]);
      return concat_f32(net, step, inputs, y, part.positions);
    }
  }
}

}  // namespace fastcascade
