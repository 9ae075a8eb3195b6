// Differential fuzzing of the engine without Python. Random cascades must give the same results on every instruction
// set of this machine, on one thread and on several, with and without NaN in other images. tools/fuzz.py builds this
// with sanitizers.
//
//   fuzz SECONDS SEED      prints the seed of the first failing case and exits 1
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>

#include "../executor.h"

namespace fastcascade {
namespace {

// Small random numbers. The same seed gives the same case on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  std::vector<float> integers(int64_t count, int64_t limit) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& x : v) x = static_cast<float>(between(-limit, limit));
    return v;
  }

 private:
  std::mt19937_64 engine_;
};

// The largest magnitude that a value can have, and its `unit`, a power of two: averages of four make quarters.
struct Bound {
  double value, unit;
  bool clipped;  // a large value was clamped to a small one, so the rounding error of the large one would show
  bool rounded;  // an operation rounded, so results are close, but not the same on every instruction set
};

// A stage whose numbers are small multiples of a power of two, and whose sums stay below 2²⁴ of them. fp32 computes
// these exactly, so direct kernels must agree bit for bit, unless an operation rounds: a division or an exponential.
class RandomStage {
 public:
  RandomStage(Random& random, Shape input, Bound bound, int64_t classes)
      : random_(random), shape_(input), bound_(bound) {
    stage_.name = "fuzz";
    stage_.input = input;
    const int64_t layers = random.between(1, 5);
    for (int64_t i = 0; i < layers; ++i) add_layer();
    stage_.features = value_;
    features_ = shape_;
    features_bound_ = bound_;
    stage_.logits = add_head(classes);
  }
  const StageSpec& spec() const { return stage_; }
  Shape features() const { return features_; }
  Bound features_bound() const { return features_bound_; }
  Bound logits_bound() const { return bound_; }

 private:
  Random& random_;
  StageSpec stage_;
  Shape shape_, features_;
  Bound bound_, features_bound_;
  int64_t value_ = 0;

  OpSpec op(OpKind kind) {
    OpSpec o;
    o.kind = kind;
    o.inputs = {value_};
    o.output = static_cast<int64_t>(stage_.ops.size()) + 1;
    return o;
  }

  OpSpec clamped_op(OpKind kind) {
    OpSpec o = op(kind);
    if (random_.chance(50)) o.activation.low = 0.f;
    if (random_.chance(10)) clip(o);
    return o;
  }

  void clip(OpSpec& o) {
    o.activation.high = 6.f;
    bound_.clipped |= bound_.value > 100 * bound_.unit;
  }

  // Clamps what the next operation reads, if it can be larger than `limit` units.
  void limit_values(double limit) {
    if (bound_.value <= limit * bound_.unit) return;
    OpSpec o = op(OpKind::activation);
    o.activation.low = 0.f;
    clip(o);
    push(std::move(o), shape_);
    bound_.value = 6 * bound_.unit;
  }

  void push(OpSpec o, Shape out) {
    value_ = o.output;
    shape_ = out;
    stage_.ops.push_back(std::move(o));
  }

  // Updates the bound for a sum of `terms` values with weights −1, 0 or 1, and a bias. Clamps the values first if the
  // sum might be inexact.
  void bound_sum(int64_t terms) {
    limit_values((1 << 22) / static_cast<double>(terms + 1) / bound_.unit);
    bound_.value = bound_.value * static_cast<double>(terms + 1) + 16 * bound_.unit;
  }

  void add_layer() {
    switch (random_.between(0, 15)) {
      case 0: return add_pool();
      case 1: return add_shift();
      case 2: return add_pad();
      case 3: return add_slice();
      case 4: return add_concat();
      case 5: return add_sizes();
      case 6: return add_gate();
      case 7: return add_leak();
      case 8: return add_function();
      case 9: return add_channel_op();
      default: return add_conv();
    }
  }

  int64_t random_divisor(int64_t n) {
    int64_t divisor = random_.between(1, n);
    while (n % divisor) --divisor;
    return divisor;
  }

  void add_conv() {
    const bool winograd = random_.chance(60);  // 3×3, stride 1
    bound_sum(shape_.c * (winograd ? 9 : 16));
    OpSpec o = clamped_op(OpKind::conv2d);
    o.groups = random_.chance(60) ? 1 : random_divisor(shape_.c);
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = axis ? shape_.w : shape_.h;
      o.kernel[axis] = winograd ? 3 : random_.between(1, 4);
      o.stride[axis] = winograd ? 1 : random_.between(1, 2);
      o.dilation[axis] = winograd ? 1 : random_.between(1, 2);
      o.padding[2 * axis] = o.padding[2 * axis + 1] = winograd ? 1 : random_.between(0, 2);
      const int64_t reach = (o.kernel[axis] - 1) * o.dilation[axis] + 1;
      if (reach > size + 2 * o.padding[axis * 2]) o.kernel[axis] = o.dilation[axis] = 1;
    }
    const int64_t out = o.groups * random_.between(1, o.groups == shape_.c ? 2 : 40 / o.groups + 1);
    o.weight_shape = {out, shape_.c / o.groups, o.kernel[0], o.kernel[1]};
    o.weight = random_.integers(out * o.weight_shape[1] * o.kernel[0] * o.kernel[1], 1);
    o.bias = random_.integers(out, 9);
    const auto side = [&](int64_t size, int axis) {
      return (size + 2 * o.padding[2 * axis] - (o.kernel[axis] - 1) * o.dilation[axis] - 1) / o.stride[axis] + 1;
    };
    const Shape result{out, side(shape_.h, 0), side(shape_.w, 1)};
    const bool keeps_shape = result == shape_;
    const int64_t before = value_;
    if (keeps_shape && random_.chance(40)) o.residual = before;
    push(std::move(o), result);
    if (keeps_shape && random_.chance(40)) add_sum(before);
  }

  void add_sum(int64_t other) {
    bound_.value *= 2;
    OpSpec o = clamped_op(OpKind::add);
    o.inputs.push_back(other);
    push(std::move(o), shape_);
  }

  void add_pool() {
    OpSpec o = op(OpKind::pool);
    o.is_max = random_.chance(50) || shape_.h < 2 || shape_.w < 2;
    o.kernel = {std::min<int64_t>(2, shape_.h), std::min<int64_t>(2, shape_.w)};
    o.stride = o.kernel;
    if (!o.is_max) bound_ = {4 * bound_.value, 4 * bound_.unit, bound_.clipped, bound_.rounded};
    const Shape result{shape_.c, shape_.h / o.kernel[0], shape_.w / o.kernel[1]};
    push(std::move(o), result);
  }

  void add_shift() {
    bound_sum(1);
    OpSpec o = clamped_op(OpKind::scale_shift);
    o.weight = random_.integers(shape_.c, 1);
    o.bias = random_.integers(shape_.c, 5);
    push(std::move(o), shape_);
  }

  void add_pad() {
    OpSpec o = op(OpKind::pad);
    for (int axis = 0; axis < 3; ++axis) {
      o.before[axis] = random_.between(0, 2);
      o.after[axis] = random_.between(0, 2);
    }
    o.value = static_cast<float>(random_.between(-3, 3));
    bound_.value = std::max(bound_.value, 3 * bound_.unit);
    const Shape result{shape_.c + o.before[0] + o.after[0], shape_.h + o.before[1] + o.after[1],
                       shape_.w + o.before[2] + o.after[2]};
    push(std::move(o), result);
  }

  // Operations that move values into another shape.
  void add_sizes() {
    const OpKind kinds[] = {OpKind::resize, OpKind::adaptive_pool, OpKind::reorder, OpKind::reshape, OpKind::pad};
    OpSpec o = op(kinds[random_.between(0, 4)]);
    Shape out = shape_;
    if (o.kind == OpKind::reorder) {
      out.c = random_.between(1, 40);
      for (int64_t c = 0; c < out.c; ++c) o.channels.push_back(random_.between(0, shape_.c - 1));
    } else if (o.kind == OpKind::reshape) {
      out = {shape_.h, shape_.c, shape_.w};
    } else if (o.kind == OpKind::pad) {
      o.pad_mode = random_.chance(50) ? PadMode::reflect : PadMode::replicate;
      o.before[1] = random_.between(0, shape_.h - 1);
      o.after[2] = random_.between(0, shape_.w - 1);
      out = {shape_.c, shape_.h + o.before[1], shape_.w + o.after[2]};
    } else {
      out = {shape_.c, random_.between(1, 9), random_.between(1, 9)};
      o.is_max = true;
      o.interpolation = Interpolation::nearest;
    }
    o.size = out;
    push(std::move(o), out);
  }

  // A product or sum with the largest value of each channel.
  void add_gate() {
    limit_values(1000 / bound_.unit);
    const int64_t gated = value_;
    const Shape shape = shape_;
    OpSpec squeeze = op(OpKind::adaptive_pool);
    squeeze.is_max = true;
    squeeze.size = {shape_.c, 1, 1};
    push(std::move(squeeze), {shape_.c, 1, 1});
    const bool product = bound_.unit <= 64 && random_.chance(50);
    OpSpec o = op(product ? OpKind::multiply : OpKind::add);
    o.inputs.insert(o.inputs.begin() + random_.between(0, 1), gated);
    push(std::move(o), shape);
    bound_.value *= product ? bound_.value : 2;
    if (product) bound_.unit *= bound_.unit;
  }

  void add_leak() {
    OpSpec o = op(OpKind::activation);
    o.activation.function = Function::leaky_relu;
    o.activation.parameter = 0.5f;
    bound_ = {2 * bound_.value, 2 * bound_.unit, bound_.clipped, bound_.rounded};
    push(std::move(o), shape_);
  }

  void add_function() {
    static const Function functions[] = {Function::elu,        Function::sigmoid, Function::hard_sigmoid,
                                         Function::silu,       Function::gelu,    Function::gelu_tanh,
                                         Function::hard_swish, Function::mish,    Function::tanh};
    limit_values(100);
    OpSpec o = op(OpKind::activation);
    o.activation.function = functions[random_.between(0, 8)];
    o.activation.parameter = o.activation.function == Function::elu ? 1.f : 0.f;
    bound_.value = std::max(bound_.value, bound_.unit);
    bound_.rounded = true;
    push(std::move(o), shape_);
  }

  void add_channel_op() {
    limit_values(100);
    const OpKind kinds[] = {OpKind::softmax, OpKind::channel_reduce, OpKind::layer_norm};
    OpSpec o = op(kinds[random_.between(0, 2)]);
    Shape out = shape_;
    o.is_max = random_.chance(50);
    if (o.kind == OpKind::softmax) o.parts = shape_.c % 2 || random_.chance(50) ? shape_.c : shape_.c / 2;
    if (o.kind == OpKind::channel_reduce) out.c = 1;
    if (o.kind == OpKind::layer_norm) {
      o.weight = random_.integers(shape_.c, 2);
      o.bias = random_.integers(shape_.c, 5);
      o.value = 1.f;
      bound_.value = (2 * std::sqrt(static_cast<double>(shape_.c)) + 5) * bound_.unit;
    }
    bound_.value = std::max(bound_.value, bound_.unit);
    bound_.rounded |= o.kind != OpKind::channel_reduce || !o.is_max;
    push(std::move(o), out);
  }

  void add_slice() {
    OpSpec o = op(OpKind::slice);
    const int64_t sizes[3] = {shape_.c, shape_.h, shape_.w};
    int64_t out[3];
    for (int axis = 0; axis < 3; ++axis) {
      o.start[axis] = random_.between(0, (sizes[axis] - 1) / 2);
      o.stop[axis] = random_.between(o.start[axis] + 1, sizes[axis]);
      o.step[axis] = random_.between(1, 3);
      out[axis] = (o.stop[axis] - o.start[axis] + o.step[axis] - 1) / o.step[axis];
    }
    push(std::move(o), {out[0], out[1], out[2]});
  }

  void add_concat() {
    OpSpec o = op(OpKind::concat);
    o.inputs.push_back(value_);
    push(std::move(o), {2 * shape_.c, shape_.h, shape_.w});
  }

  int64_t add_head(int64_t classes) {
    push(op(OpKind::flatten), {shape_.c * shape_.h * shape_.w, 1, 1});
    bound_sum(shape_.c);
    OpSpec linear = op(OpKind::linear);
    linear.weight_shape = {classes, shape_.c, 1, 1};
    linear.weight = random_.integers(classes * shape_.c, 1);
    linear.bias = random_.integers(classes, 3);
    push(std::move(linear), {classes, 1, 1});
    return value_;
  }
};

Selector random_selector(Random& random, int64_t classes) {
  static const Score scores[] = {Score::mlp_stats, Score::mlp_probs, Score::max_prob,
                                 Score::margin,    Score::entropy,   Score::mlp_topk};
  Selector s;
  s.score = scores[random.between(0, classes < 3 ? 4 : 5)];
  if (s.score == Score::max_prob || s.score == Score::margin || s.score == Score::entropy) return s;
  s.features = s.score == Score::mlp_probs ? classes : 4;
  s.hidden = random.between(1, 9);
  s.mean = random.integers(s.features, 3);
  s.std.assign(static_cast<size_t>(s.features), 2.f);
  s.w1 = random.integers(s.hidden * s.features, 2);
  s.b1 = random.integers(s.hidden, 2);
  s.w2 = random.integers(s.hidden, 2);
  return s;
}

constexpr int64_t kSmallSide = 13;  // of images; larger ones, whose layers threads cut into more parts, are few

// A cascade and a batch of images, with gaps between their elements and axes in either order.
struct Case {
  CascadeSpec spec;
  std::vector<float> floats, table, thresholds;
  std::vector<uint8_t> bytes;
  Images images;
  std::vector<bool> has_nan;  // per image
  bool clipped = false, rounded = false;
};

void add_images(Random& random, Case& c, Shape shape) {
  const int64_t few = shape.h * shape.w > kSmallSide * kSmallSide ? 3 : 8, gap = random.between(1, 2);
  const int64_t count = few < 8 || random.chance(50) ? random.between(0, few) : random.between(9, 120);
  Images& images = c.images;
  images = {nullptr, random.chance(30), nullptr, count, {shape.c * shape.h * shape.w * gap, 0, 0, 0}};
  if (random.chance(50)) {
    images.strides[1] = shape.h * shape.w * gap;
    images.strides[2] = shape.w * gap;
    images.strides[3] = gap;
  } else {
    images.strides[1] = gap;
    images.strides[2] = shape.w * shape.c * gap;
    images.strides[3] = shape.c * gap;
  }
  c.has_nan.assign(static_cast<size_t>(count), false);
  const int64_t size = count * images.strides[0];
  if (images.bytes) {
    c.table = random.integers(shape.c * 256, 3);
    for (int64_t i = 0; i < size; ++i) c.bytes.push_back(static_cast<uint8_t>(random.between(0, 255)));
  } else {
    c.floats = random.integers(size, 3);
  }
}

void add_nans(Random& random, Case& c) {
  if (c.images.bytes) return;
  for (int64_t row = 0; row < c.images.count; ++row) {
    if (!random.chance(20)) continue;
    c.has_nan[static_cast<size_t>(row)] = true;
    c.floats[static_cast<size_t>(row * c.images.strides[0])] = std::numeric_limits<float>::quiet_NaN();
  }
}

Case make_case(uint64_t seed, bool with_nans) {
  Random random(seed);
  Case c;
  const int64_t side = random.chance(5) ? 64 : kSmallSide;
  const Shape shape = {random.between(1, 20), random.between(1, side), random.between(1, side)};
  const Bound image_bound{3, 1, false, false};
  c.spec.classes = random.between(2, 6);
  const int64_t stages = random.between(1, 3);
  if (random.chance(50))
    for (int64_t k = 0; k < stages; ++k) c.spec.stage_weights.push_back(static_cast<float>(random.between(1, 4)) / 4.f);
  Shape features;
  Bound features_bound = image_bound;
  for (int64_t k = 0; k < stages; ++k) {
    const bool previous = k > 0 && random.chance(50);
    RandomStage stage(random, previous ? features : shape, previous ? features_bound : image_bound, c.spec.classes);
    c.spec.stages.push_back(stage.spec());
    if (previous) c.spec.stages.back().input_kind = StageInput::previous;
    if (previous) c.spec.stages[static_cast<size_t>(k) - 1].keeps_features = true;
    features = stage.features();
    features_bound = stage.features_bound();
    c.clipped |= stage.logits_bound().clipped;
    c.rounded |= stage.logits_bound().rounded;
    c.spec.selectors.push_back(k + 1 < stages ? random_selector(random, c.spec.classes) : Selector());
    if (k + 1 < stages) c.thresholds.push_back(static_cast<float>(random.between(-10, 30)) + 0.5f);
  }
  add_images(random, c, shape);
  if (with_nans) add_nans(random, c);
  return c;
}

struct Output {
  std::vector<float> log_probs;
  std::vector<int64_t> label, exit_stage;
  size_t classes;

  bool same_row(const Output& o, size_t row) const {
    return label[row] == o.label[row] && exit_stage[row] == o.exit_stage[row] &&
           !std::memcmp(&log_probs[row * classes], &o.log_probs[row * classes], classes * sizeof(float));
  }
  bool operator==(const Output& o) const {
    for (size_t row = 0; row < label.size(); ++row)
      if (!same_row(o, row)) return false;
    return true;
  }
};

Output run(const Executor& executor, const Case& c) {
  const auto n = static_cast<size_t>(c.images.count), classes = static_cast<size_t>(c.spec.classes);
  Output out{std::vector<float>(n * classes), std::vector<int64_t>(n), std::vector<int64_t>(n), classes};
  Images images = c.images;
  images.data = images.bytes ? static_cast<const void*>(c.bytes.data()) : c.floats.data();
  images.table = c.table.data();
  executor.run(images, c.thresholds.data(), {out.log_probs.data(), out.label.data(), out.exit_stage.data()});
  return out;
}

Output run(Case c, const char* isa, int threads, const char* kernel) {
  c.spec.isa = isa;
  c.spec.threads = threads;
  c.spec.forced_kernel = kernel;
  return run(Executor(c.spec), c);
}

// True where the results are close. Winograd rounds, but a wrong value would be far off. Instances that stop at another
// stage had a score within rounding of the threshold. A NaN spreads through a Winograd tile, so instances that have one
// may differ.
bool close(const Output& a, const Output& b, const std::vector<bool>& has_nan) {
  for (size_t row = 0; row < a.label.size(); ++row) {
    if (a.exit_stage[row] != b.exit_stage[row] || has_nan[row]) continue;
    const float *x = &a.log_probs[row * a.classes], *y = &b.log_probs[row * a.classes];
    const float largest = -*std::min_element(y, y + a.classes);
    for (size_t i = 0; i < a.classes; ++i)
      if (!(std::fabs(x[i] - y[i]) <= 0.05f + 2e-4f * largest)) return false;
  }
  return true;
}

bool same_without_nan(const Output& a, const Output& b, const std::vector<bool>& has_nan) {
  for (size_t row = 0; row < a.label.size(); ++row)
    if (!has_nan[row] && !a.same_row(b, row)) return false;
  return true;
}

// True where a NaN may reach other groups of a convolution. Groups are merged with their neighbours, with zeros between
// them, until their outputs fill vectors, and NaN times zero is NaN. Which groups it reaches depends on the vector
// width.
bool merges_groups(const Case& c) {
  for (const StageSpec& stage : c.spec.stages)
    for (const OpSpec& op : stage.ops)
      if (op.groups > 1) return true;
  return false;
}

const char* check_isa(const Case& c, const Case& clean, const Output& expected, const char* isa) {
  const Output direct = run(c, isa, 1, "conv_direct_f32");
  const bool same = c.rounded          ? c.clipped || close(direct, expected, c.has_nan)
                    : merges_groups(c) ? same_without_nan(direct, expected, c.has_nan)
                                       : direct == expected;
  if (!same) return "direct kernels differ";
  if (!(run(c, isa, 3, "conv_direct_f32") == direct)) return "threads change the result";
  const Output winograd = run(c, isa, 1, "conv3x3_winograd_f32");
  if (!c.clipped && !close(winograd, expected, c.has_nan)) return "Winograd is off";
  Case forced = clean;
  forced.spec.isa = isa;
  forced.spec.threads = 2;
  forced.spec.forced_kernel = "conv3x3_winograd_f32";
  const Executor shared(forced.spec);
  Output first, second;
  std::thread other([&] { first = run(shared, forced); });
  second = run(shared, forced);
  other.join();
  if (!(first == second)) return "two callers disturb each other";
  if (!same_without_nan(first, winograd, c.has_nan)) return "a NaN or a thread changes another instance";
  return nullptr;
}

const char* check(uint64_t seed) {
  const Case c = make_case(seed, true), clean = make_case(seed, false);
  const Output expected = run(c, "portable", 1, "conv_direct_f32");
  for (const Isa& isa : isas()) {
    if (!isa.table || !isa.supported()) continue;
    if (const char* fault = check_isa(c, clean, expected, isa.name)) return fault;
  }
  return nullptr;
}

}  // namespace
}  // namespace fastcascade

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const auto start = std::chrono::steady_clock::now();
  int cases = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++seed, ++cases) {
    const char* fault = fastcascade::check(seed);
    if (!fault) continue;
    std::printf("%s; reproduce with: fuzz 0.001 %llu\n", fault, static_cast<unsigned long long>(seed));
    return 1;
  }
  std::printf("%d cases agree\n", cases);
  return 0;
}
