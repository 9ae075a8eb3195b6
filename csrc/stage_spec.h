// A stage as the plan describes it: a list of operations on numbered values. Value 0 is the stage's input.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastcascade {

// Upper limit of any value, of any weight tensor and of one instance's activations: 8 GiB. Small enough that no
// product of a plan's sizes overflows 64 bits.
constexpr int64_t kMaxFloats = int64_t{1} << 31;
constexpr size_t kMaxInputs = 64;  // of one operation

// Image values beyond this count as NaN, as infinity does: above it, one algorithm overflows where another does not.
constexpr float kMaxPixel = 1e20f;

struct Shape {
  int64_t c = 0, h = 1, w = 1;
  bool operator==(const Shape& o) const { return c == o.c && h == o.h && w == o.w; }
  int64_t size() const { return c * h * w; }
  std::string text() const {
    return "(" + std::to_string(c) + ", " + std::to_string(h) + ", " + std::to_string(w) + ")";
  }
};

enum class OpKind {
  conv2d,
  pool,
  adaptive_pool,
  linear,
  add,
  multiply,
  activation,
  scale_shift,
  layer_norm,
  softmax,
  channel_reduce,
  resize,
  reorder,
  reshape,
  slice,
  pad,
  concat,
  flatten,
  quantize,
  dequantize,
  int8_conv2d,
  int8_linear
};

enum class PadMode { constant, reflect, replicate };
enum class Interpolation { bilinear, nearest, bicubic };

// What an operation on bytes has beside the fields of a convolution; int8.h defines it. Its weights are integers.
struct Int8Spec {
  std::vector<float> multiplier;
  float scale = 1.f;       // of quantize and dequantize
  int64_t zero_point = 0;  // of the bytes that it reads; of a quantize, that it writes
  float residual_scale = 0.f;
  int64_t residual_zero_point = 0;
  float low = 0.f, high = 0.f;
  std::optional<int64_t> output_zero_point;  // none where the output is float32
  float error = 0.f;                         // measured by whoever quantised, for describe()
};

// One operation. Fields that its kind does not use keep their defaults. Arrays are (C, H, W) or (height, width);
// padding is (top, bottom, left, right).
struct OpSpec {
  OpKind kind = OpKind::activation;
  int64_t output = 0;
  std::vector<int64_t> inputs;
  int64_t residual = -1;
  Activation activation;
  std::array<int64_t, 4> weight_shape{};
  std::vector<float> weight, bias;  // scale and shift of scale_shift and layer_norm
  std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, dilation{1, 1};
  std::array<int64_t, 4> padding{};
  int64_t groups = 1;
  bool is_max = false, ceil_mode = false, include_padding = true;
  std::array<int64_t, 3> before{}, after{};               // pad
  std::array<int64_t, 3> start{}, stop{}, step{1, 1, 1};  // slice
  float value = 0.f;                                      // of a pad; the eps of a layer norm
  PadMode pad_mode = PadMode::constant;
  Shape size;  // of the result of adaptive_pool, resize (both without channels) and reshape
  Interpolation interpolation = Interpolation::bilinear;  // resize
  bool align_corners = false, antialias = false;          // resize
  int64_t parts = 1;                                      // softmax
  std::vector<int64_t> channels;                          // reorder: of the input, one per channel of the output
  Int8Spec int8;
  // Set by fusion only: the convolution's 2×2 maxima are its output; the residual comes last.
  bool max_pooled = false, residual_after_activation = false;

  bool has_activation() const { return activation.is_clamp() || activation.is_function(); }
};

// What a stage reads. `features` are a batch of float rows like images, but without the limit on pixels: the
// features of a stage that runs elsewhere.
enum class StageInput { image, previous, features };

struct StageSpec {
  std::string name;
  StageInput input_kind = StageInput::image;
  Shape input;
  std::vector<OpSpec> ops;  // in execution order
  int64_t features = 0, logits = 0;
  bool keeps_features = false;  // the next stage reads them

  bool is_result(int64_t value) const { return value == logits || (keeps_features && value == features); }
};

}  // namespace fastcascade
