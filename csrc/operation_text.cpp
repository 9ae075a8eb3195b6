#include "operation_text.h"

#include <cstdio>

namespace fastcascade {
namespace {

const char* function_name(Function function) {
  switch (function) {
    case Function::leaky_relu: return "leaky_relu";
    case Function::elu: return "elu";
    case Function::sigmoid: return "sigmoid";
    case Function::hard_sigmoid: return "hard_sigmoid";
    case Function::silu: return "silu";
    case Function::hard_swish: return "hard_swish";
    case Function::gelu: return "gelu";
    case Function::gelu_tanh: return "gelu_tanh";
    case Function::mish: return "mish";
    case Function::tanh: return "tanh";
    case Function::exp: return "exp";
    case Function::sqrt: return "sqrt";
    case Function::reciprocal: return "reciprocal";
    case Function::none:
    case Function::count: break;
  }
  return "none";
}

std::string interpolation_name(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::bilinear: return "bilinear";
    case Interpolation::nearest: return "nearest";
    case Interpolation::bicubic: return "bicubic";
  }
  return "";
}

std::string activation_text(const Activation& a) {
  if (a.is_function()) return function_name(a.function);
  return a.high == 6.f ? "relu6" : a.is_clamp() ? "relu" : "none";
}

std::string size_text(const std::array<int64_t, 2>& size) {
  return std::to_string(size[0]) + "x" + std::to_string(size[1]);
}

std::string conv_text(const OpSpec& op, const Shape& in) {
  std::string text = "conv " + size_text(op.kernel);
  if (op.stride[0] != 1 || op.stride[1] != 1) text += " stride " + std::to_string(op.stride[0]);
  if (op.groups > 1) text += " groups " + std::to_string(op.groups);
  text += " " + in.text();
  if (op.residual >= 0) text += " + residual";
  if (op.max_pooled) text += " + max pool 2x2";
  return text;
}

std::string error_text(const OpSpec& op) {
  char text[32];
  std::snprintf(text, sizeof text, ", error %.1f%%", 100.0 * static_cast<double>(op.int8.error));
  return text;
}

std::string kind_text(const OpSpec& op, const Shape& in) {
  switch (op.kind) {
    case OpKind::conv2d: return conv_text(op, in);
    case OpKind::linear: return "linear " + in.text();
    case OpKind::pool: return (op.is_max ? "max pool " : "average pool ") + size_text(op.kernel) + " " + in.text();
    case OpKind::adaptive_pool: return (op.is_max ? "adaptive max pool " : "adaptive average pool ") + in.text();
    case OpKind::add: return "add";
    case OpKind::multiply: return "multiply";
    case OpKind::activation: return "";
    case OpKind::scale_shift: return "scale and shift";
    case OpKind::layer_norm: return "layer norm";
    case OpKind::softmax: return "softmax of " + std::to_string(op.parts) + " parts";
    case OpKind::channel_reduce: return op.is_max ? "maximum over channels" : "mean over channels";
    case OpKind::resize: return interpolation_name(op.interpolation) + (" resize " + in.text());
    case OpKind::reorder: return "reorder channels";
    case OpKind::reshape: return "reshape " + in.text();
    case OpKind::slice: return "slice";
    case OpKind::pad: return "pad";
    case OpKind::concat: return "concat";
    case OpKind::flatten: return "flatten";
    case OpKind::quantize: return "quantize";
    case OpKind::dequantize: return "dequantize";
    case OpKind::int8_conv2d: return "int8 " + conv_text(op, in) + error_text(op);
    case OpKind::int8_linear: return "int8 linear " + in.text() + error_text(op);
  }
  return "";
}

}  // namespace

std::string operation_text(const OpSpec& op, const Shape& in) {
  const std::string text = kind_text(op, in);
  if (text.empty()) return activation_text(op.activation);
  return op.has_activation() ? text + " + " + activation_text(op.activation) : text;
}

}  // namespace fastcascade
