// Random int8 layers on every set of int8 kernels: the bits of plain loops.
//
// usage: int8_fuzz SECONDS [SEED]
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../int8_steps.h"
#include "../pack.h"

namespace fastcascade {
namespace {

constexpr int64_t kWidestVector = 16;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(int64_t percent) { return between(1, 100) <= percent; }
  float real(float size) { return std::normal_distribution<float>(0.f, size)(engine_); }

 private:
  std::mt19937_64 engine_;
};

// A layer, its bytes, and a residual of its output's shape.
struct Case {
  OpSpec op;
  Value in, out;
  int64_t instances = 1;
  std::vector<uint8_t> input, residual;
};

Value value_of(const Shape& shape, int64_t pitch, bool bytes) {
  Value v;
  v.shape = shape;
  v.bytes = bytes;
  v.set_pitch(pitch);
  return v;
}

void add_weights(Random& random, OpSpec& op) {
  const bool extreme = random.chance(20);
  const int64_t terms = op.weight_shape[1] * op.weight_shape[2] * op.weight_shape[3];
  for (int64_t i = 0; i < op.weight_shape[0] * terms; ++i)
    op.weight.push_back(extreme ? (random.chance(50) ? 127.f : -127.f) : static_cast<float>(random.between(-127, 127)));
  for (int64_t o = 0; o < op.weight_shape[0]; ++o) {
    op.int8.multiplier.push_back(0.01f * random.real(1.f) / static_cast<float>(1 + terms / 16));
    op.bias.push_back(random.real(50.f));
  }
}

Case make_case(uint64_t seed) {
  Random random(seed);
  Case c;
  OpSpec& op = c.op;
  op.kind = OpKind::int8_conv2d;
  const bool depthwise = random.chance(25);
  op.groups = depthwise || random.chance(25) ? random.between(2, 40) : 1;
  const int64_t in_per_group = depthwise           ? 1
                               : random.chance(50) ? random.between(1, 8)
                                                   : random.between(1, 40),
                out_per_group = depthwise ? 1 : random.between(1, 40);
  const Shape in{op.groups * in_per_group, random.between(1, 9), random.between(1, 33)};
  op.kernel = {random.between(1, 7), random.between(1, 7)};
  op.stride = {random.between(1, 2), random.between(1, 2)};
  op.dilation = {random.between(1, 2), random.between(1, 2)};
  if (random.chance(40)) op.kernel = {3, 3}, op.stride = op.dilation = {1, 1};  // by Winograd where kernels have it
  for (int64_t& padding : op.padding) padding = random.between(0, 3);
  int64_t side[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = (op.kernel[axis] - 1) * op.dilation[axis] + 1;
    op.padding[2 * axis] = std::max(op.padding[2 * axis], reach - (axis ? in.w : in.h));
    side[axis] = ((axis ? in.w : in.h) + op.padding[2 * axis] + op.padding[2 * axis + 1] - reach) / op.stride[axis] + 1;
  }
  op.weight_shape = {op.groups * out_per_group, in_per_group, op.kernel[0], op.kernel[1]};
  add_weights(random, op);
  op.int8.zero_point = random.between(0, 255);
  op.int8.residual_scale = random.real(1.f);
  op.int8.residual_zero_point = random.between(0, 255);
  op.int8.low = -std::numeric_limits<float>::infinity();
  op.int8.high = -op.int8.low;
  if (random.chance(60)) {
    op.int8.output_zero_point = random.between(0, 255);
    op.int8.low = static_cast<float>(-*op.int8.output_zero_point);
    op.int8.high = static_cast<float>(255 - *op.int8.output_zero_point);
  }
  const Shape out{op.weight_shape[0], side[0], side[1]};
  c.in = value_of(in, round_up(in.c, random.chance(50) ? 4 : kWidestVector), true);
  c.out = value_of(out, round_up(out.c, kWidestVector), op.int8.output_zero_point.has_value());
  c.instances = random.between(1, 3);
  constexpr int64_t kSlack = 64;  // kernels read whole vectors
  const bool extreme = random.chance(20);
  for (int64_t i = 0; i < c.instances * in.h * in.w * c.in.pitch + kSlack; ++i)
    c.input.push_back(static_cast<uint8_t>(extreme ? 255 * random.between(0, 1) : random.between(0, 255)));
  if (random.chance(40))
    for (int64_t i = 0; i < c.instances * out.h * out.w * c.out.pitch + kSlack; ++i)
      c.residual.push_back(static_cast<uint8_t>(random.between(0, 255)));
  return c;
}

// The outputs, without padded channels, in two parts as two threads would compute them.
std::vector<uint8_t> run(const Case& c, const Int8Kernels& kernels, int64_t split) {
  Network net;
  net.int8_kernels = &kernels;
  net.values = {c.in, c.out};
  Step step;
  step.kind = int8_step_kind(c.op, c.in.shape, kernels, kWidestVector);
  step.output = 1;
  step.work_items = c.out.shape.h * c.out.shape.w;
  pack_int8_layer(step, c.op, c.in, c.out, kWidestVector, kernels);
  const int64_t pixels = c.instances * c.out.shape.h * c.out.shape.w, size = c.out.bytes ? 1 : 4;
  Buffer scratch(step.int8.scratch_floats), output(pixels * c.out.pitch * size / 4 + 16), input, residual;
  std::vector<int32_t> invalid(static_cast<size_t>(c.instances), 0);
  const auto floats = [](const std::vector<uint8_t>& bytes) { return reinterpret_cast<const float*>(bytes.data()); };
  const StepPlaces at{floats(c.input), c.residual.empty() ? nullptr : floats(c.residual), output.data(), scratch.data(),
                      invalid.data()};
  const int64_t positions = c.instances * step.work_items, middle = positions * split / 100;
  run_int8_step(net, step, at, {0, middle}, {0, step.panels});
  run_int8_step(net, step, at, {middle, positions}, {0, step.panels / 2});
  run_int8_step(net, step, at, {middle, positions}, {step.panels / 2, step.panels});
  std::vector<uint8_t> result;
  const auto* bytes = reinterpret_cast<const uint8_t*>(output.data());
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    result.insert(result.end(), bytes + pixel * c.out.pitch * size,
                  bytes + (pixel * c.out.pitch + c.out.shape.c) * size);
  return result;
}

// Σ weight · (byte - zero point) of an output; padding adds nothing.
int64_t exact_sum(const Case& c, int64_t instance, int64_t channel, int64_t y, int64_t x) {
  const OpSpec& op = c.op;
  const int64_t in = op.weight_shape[1], group = channel / (op.weight_shape[0] / op.groups);
  const Shape& image = c.in.shape;
  int64_t sum = 0;
  for (int64_t i = 0; i < in; ++i)
    for (int64_t ky = 0; ky < op.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < op.kernel[1]; ++kx) {
        const int64_t at_y = y * op.stride[0] - op.padding[0] + ky * op.dilation[0];
        const int64_t at_x = x * op.stride[1] - op.padding[2] + kx * op.dilation[1];
        if (at_y < 0 || at_y >= image.h || at_x < 0 || at_x >= image.w) continue;
        const int64_t pixel = (instance * image.h + at_y) * image.w + at_x;
        const int64_t byte = c.input[static_cast<size_t>(pixel * c.in.pitch + group * in + i)];
        const auto weight = static_cast<size_t>(((channel * in + i) * op.kernel[0] + ky) * op.kernel[1] + kx);
        sum += (byte - op.int8.zero_point) * static_cast<int64_t>(op.weight[weight]);
      }
  return sum;
}

// The outputs by plain loops, as `run` returns them. The volatile variables keep products and sums apart.
std::vector<uint8_t> run_plainly(const Case& c) {
  const Int8Spec& s = c.op.int8;
  const Shape& out = c.out.shape;
  std::vector<uint8_t> result;
  for (int64_t pixel = 0; pixel < c.instances * out.h * out.w; ++pixel)
    for (int64_t channel = 0; channel < out.c; ++channel) {
      const int64_t sum = exact_sum(c, pixel / (out.h * out.w), channel, pixel / out.w % out.h, pixel % out.w);
      volatile float product = static_cast<float>(sum) * s.multiplier[static_cast<size_t>(channel)];
      volatile float value = product + c.op.bias[static_cast<size_t>(channel)];
      if (!c.residual.empty()) {
        const int64_t byte = c.residual[static_cast<size_t>(pixel * c.out.pitch + channel)];
        product = static_cast<float>(byte - s.residual_zero_point) * s.residual_scale;
        value = value + product;
      }
      const float y = std::min(std::max(static_cast<float>(value), s.low), s.high);
      uint8_t bytes[sizeof y];
      std::memcpy(bytes, &y, sizeof y);
      if (s.output_zero_point)
        result.push_back(static_cast<uint8_t>(std::nearbyint(y) + static_cast<float>(*s.output_zero_point)));
      else
        result.insert(result.end(), bytes, bytes + sizeof y);
    }
  return result;
}

const char* check(uint64_t seed) {
  const Case c = make_case(seed);
  const std::vector<uint8_t> expected = run_plainly(c);
  for (const Int8Isa& isa : int8_isas())
    if (isa.kernels && isa.supported() && run(c, *isa.kernels, static_cast<int64_t>(seed % 101)) != expected)
      return isa.name;
  return nullptr;
}

}  // namespace
}  // namespace fastcascade

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("kernels:");
  for (const fastcascade::Int8Isa& isa : fastcascade::int8_isas())
    if (isa.kernels && isa.supported()) std::printf(" %s", isa.name);
  const auto start = std::chrono::steady_clock::now();
  int cases = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++seed, ++cases) {
    const char* isa = fastcascade::check(seed);
    if (!isa) continue;
    std::printf("\n%s differs from plain loops; reproduce with: int8_fuzz 0.001 %llu\n", isa,
                static_cast<unsigned long long>(seed));
    return 1;
  }
  std::printf("\n%d layers agree\n", cases);
  return 0;
}
