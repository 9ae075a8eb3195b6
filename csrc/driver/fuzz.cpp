// Differential fuzzing of the engine without Python: random networks and cascades run on every instruction set
// of this machine, alone and on several threads, with and without NaN in some images, and must agree. Built with the
// sanitizers by tools/fuzz.py.
//
//   fuzz SECONDS SEED      prints the seed of each failing case and exits 1
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

// A source of small random numbers; the same seed gives the same case on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t upto(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return upto(1, 100) <= percent; }
  std::vector<float> integers(int64_t count, int64_t limit) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& x : v) x = static_cast<float>(upto(-limit, limit));
    return v;
  }

 private:
  std::mt19937_64 engine_;
};

// How large a value can be, in multiples of the smallest fraction that it can have: averages make quarters.
struct Bound {
  double value, unit;
  bool clipped;  // little is left of something large, so that its rounding would show
};

// Every number is a small multiple of a power of two, and sums stay below 2²⁴ of them: exact in fp32, so that
// direct kernels must agree bit for bit.
class RandomStage {
 public:
  RandomStage(Random& random, Shape input, Bound bound, int64_t classes)
      : random_(random), shape_(input), bound_(bound) {
    stage_.name = "fuzz";
    stage_.input = input;
    const int64_t layers = random.upto(1, 5);
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
    if (random_.chance(50)) o.low = 0.f;
    if (random_.chance(10)) clip(o);
    return o;
  }

  void clip(OpSpec& o) {
    o.high = 6.f;
    bound_.clipped |= bound_.value > 100 * bound_.unit;
  }

  void push(OpSpec o, Shape out) {
    value_ = o.output;
    shape_ = out;
    stage_.ops.push_back(std::move(o));
  }

  // Makes room for a sum of `terms` values, each weighted by −1, 0 or 1, and something small.
  void make_room(int64_t terms) {
    if (bound_.value * static_cast<double>(terms + 1) > 1 << 22) {
      OpSpec o = op(OpKind::activation);
      o.low = 0.f;
      clip(o);
      push(std::move(o), shape_);
      bound_.value = 6 * bound_.unit;
    }
    bound_.value = bound_.value * static_cast<double>(terms + 1) + 16 * bound_.unit;
  }

  void add_layer() {
    switch (random_.upto(0, 9)) {
      case 0: return add_pool();
      case 1: return add_shift();
      case 2: return add_pad();
      case 3: return add_slice();
      case 4: return add_concat();
      default: return add_conv();
    }
  }

  void add_conv() {
    const bool plain = random_.chance(60);  // 3×3, stride 1: what Winograd takes
    make_room(shape_.c * (plain ? 9 : 16));
    OpSpec o = clamped_op(OpKind::conv2d);
    o.groups = plain || random_.chance(60) ? 1 : shape_.c;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = axis ? shape_.w : shape_.h;
      o.kernel[axis] = plain ? 3 : random_.upto(1, 4);
      o.stride[axis] = plain ? 1 : random_.upto(1, 2);
      o.dilation[axis] = plain ? 1 : random_.upto(1, 2);
      o.padding[2 * axis] = o.padding[2 * axis + 1] = plain ? 1 : random_.upto(0, 2);
      const int64_t reach = (o.kernel[axis] - 1) * o.dilation[axis] + 1;
      if (reach > size + 2 * o.padding[axis * 2]) o.kernel[axis] = o.dilation[axis] = 1;
    }
    const int64_t out = o.groups == 1 ? random_.upto(1, 40) : shape_.c * random_.upto(1, 2);
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
    if (!o.is_max) bound_ = {4 * bound_.value, 4 * bound_.unit, bound_.clipped};
    const Shape result{shape_.c, shape_.h / o.kernel[0], shape_.w / o.kernel[1]};
    push(std::move(o), result);
  }

  void add_shift() {
    make_room(1);
    OpSpec o = clamped_op(OpKind::scale_shift);
    o.weight = random_.integers(shape_.c, 1);
    o.bias = random_.integers(shape_.c, 5);
    push(std::move(o), shape_);
  }

  void add_pad() {
    OpSpec o = op(OpKind::pad);
    for (int axis = 0; axis < 3; ++axis) {
      o.before[axis] = random_.upto(0, 2);
      o.after[axis] = random_.upto(0, 2);
    }
    o.value = static_cast<float>(random_.upto(-3, 3));
    bound_.value = std::max(bound_.value, 3 * bound_.unit);
    const Shape result{shape_.c + o.before[0] + o.after[0], shape_.h + o.before[1] + o.after[1],
                       shape_.w + o.before[2] + o.after[2]};
    push(std::move(o), result);
  }

  void add_slice() {
    OpSpec o = op(OpKind::slice);
    const int64_t sizes[3] = {shape_.c, shape_.h, shape_.w};
    int64_t out[3];
    for (int axis = 0; axis < 3; ++axis) {
      o.start[axis] = random_.upto(0, (sizes[axis] - 1) / 2);
      o.stop[axis] = random_.upto(o.start[axis] + 1, sizes[axis]);
      o.step[axis] = random_.upto(1, 3);
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
    make_room(shape_.c);
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
  s.score = scores[random.upto(0, classes < 3 ? 4 : 5)];
  if (s.score == Score::max_prob || s.score == Score::margin || s.score == Score::entropy) return s;
  s.features = s.score == Score::mlp_probs ? classes : 4;
  s.hidden = random.upto(1, 9);
  s.mean = random.integers(s.features, 3);
  s.std.assign(static_cast<size_t>(s.features), 2.f);
  s.w1 = random.integers(s.hidden * s.features, 2);
  s.b1 = random.integers(s.hidden, 2);
  s.w2 = random.integers(s.hidden, 2);
  return s;
}

// Images with gaps between their elements, in either order of axes; some may hold a NaN.
struct Case {
  CascadeSpec spec;
  std::vector<float> floats, table, thresholds;
  std::vector<uint8_t> bytes;
  Images images;
  std::vector<bool> poisoned;  // per image
  bool clipped = false;
};

void add_images(Random& random, Case& c, Shape shape) {
  const int64_t count = random.chance(50) ? random.upto(0, 8) : random.upto(9, 120), gap = random.upto(1, 2);
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
  c.poisoned.assign(static_cast<size_t>(count), false);
  const int64_t size = count * images.strides[0];
  if (images.bytes) {
    c.table = random.integers(shape.c * 256, 3);
    for (int64_t i = 0; i < size; ++i) c.bytes.push_back(static_cast<uint8_t>(random.upto(0, 255)));
  } else {
    c.floats = random.integers(size, 3);
  }
}

void poison(Random& random, Case& c) {
  if (c.images.bytes) return;
  for (int64_t row = 0; row < c.images.count; ++row) {
    if (!random.chance(20)) continue;
    c.poisoned[static_cast<size_t>(row)] = true;
    c.floats[static_cast<size_t>(row * c.images.strides[0])] = std::numeric_limits<float>::quiet_NaN();
  }
}

Case make_case(uint64_t seed, bool poisoned) {
  Random random(seed);
  Case c;
  const Shape shape = {random.upto(1, 20), random.upto(1, 13), random.upto(1, 13)};
  const Bound image_bound{3, 1, false};
  c.spec.classes = random.upto(2, 6);
  const int64_t stages = random.upto(1, 3);
  if (random.chance(50))
    for (int64_t k = 0; k < stages; ++k) c.spec.stage_weights.push_back(static_cast<float>(random.upto(1, 4)) / 4.f);
  Shape features;
  Bound features_bound = image_bound;
  for (int64_t k = 0; k < stages; ++k) {
    const bool previous = k > 0 && random.chance(50);
    RandomStage stage(random, previous ? features : shape, previous ? features_bound : image_bound, c.spec.classes);
    c.spec.stages.push_back(stage.spec());
    c.spec.stages.back().reads_previous = previous;
    if (previous) c.spec.stages[static_cast<size_t>(k) - 1].keeps_features = true;
    features = stage.features();
    features_bound = stage.features_bound();
    c.clipped |= stage.logits_bound().clipped;
    c.spec.selectors.push_back(k + 1 < stages ? random_selector(random, c.spec.classes) : Selector());
    if (k + 1 < stages) c.thresholds.push_back(static_cast<float>(random.upto(-10, 30)) + 0.5f);
  }
  add_images(random, c, shape);
  if (poisoned) poison(random, c);
  return c;
}

struct Answer {
  std::vector<float> log_probs;
  std::vector<int64_t> label, exit_stage;
  size_t classes;

  bool same_row(const Answer& o, size_t row) const {
    return label[row] == o.label[row] && exit_stage[row] == o.exit_stage[row] &&
           !std::memcmp(&log_probs[row * classes], &o.log_probs[row * classes], classes * sizeof(float));
  }
  bool operator==(const Answer& o) const {
    for (size_t row = 0; row < label.size(); ++row)
      if (!same_row(o, row)) return false;
    return true;
  }
};

Answer answer(const Executor& executor, const Case& c) {
  const auto n = static_cast<size_t>(c.images.count), classes = static_cast<size_t>(c.spec.classes);
  Answer a{std::vector<float>(n * classes), std::vector<int64_t>(n), std::vector<int64_t>(n), classes};
  Images images = c.images;
  images.data = images.bytes ? static_cast<const void*>(c.bytes.data()) : c.floats.data();
  images.table = c.table.data();
  executor.run(images, c.thresholds.data(), {a.log_probs.data(), a.label.data(), a.exit_stage.data()});
  return a;
}

Answer answer(Case c, const char* isa, int threads, const char* kernel) {
  c.spec.isa = isa;
  c.spec.threads = threads;
  c.spec.forced_kernel = kernel;
  return answer(Executor(c.spec), c);
}

// Winograd rounds, so that only its own schedule is held to the bit; a corrupt value would be far off. Rows that
// stop elsewhere had a score within rounding of its threshold. A NaN reaches all of a tile, so that poisoned rows
// may differ.
bool near(const Answer& a, const Answer& b, const std::vector<bool>& poisoned) {
  for (size_t row = 0; row < a.label.size(); ++row) {
    if (a.exit_stage[row] != b.exit_stage[row] || poisoned[row]) continue;
    const float *x = &a.log_probs[row * a.classes], *y = &b.log_probs[row * a.classes];
    const float largest = -*std::min_element(y, y + a.classes);
    for (size_t i = 0; i < a.classes; ++i)
      if (!(std::fabs(x[i] - y[i]) <= 0.05f + 2e-4f * largest)) return false;
  }
  return true;
}

bool same_where_clean(const Answer& a, const Answer& b, const std::vector<bool>& poisoned) {
  for (size_t row = 0; row < a.label.size(); ++row)
    if (!poisoned[row] && !a.same_row(b, row)) return false;
  return true;
}

// Neighbouring groups of a convolution are merged, with zeros between them, until their outputs fill vectors of the
// instruction set, and NaN times zero is NaN: which other groups it reaches depends on the width.
bool merges_groups(const Case& c) {
  for (const StageSpec& stage : c.spec.stages)
    for (const OpSpec& op : stage.ops)
      if (op.groups > 1) return true;
  return false;
}

const char* check_isa(const Case& c, const Case& clean, const Answer& expected, const char* isa) {
  const Answer direct = answer(c, isa, 1, "conv_direct_f32");
  const bool same = merges_groups(c) ? same_where_clean(direct, expected, c.poisoned) : direct == expected;
  if (!same) return "direct kernels differ";
  if (!(answer(c, isa, 3, "conv_direct_f32") == direct)) return "threads change the answer";
  const Answer winograd = answer(c, isa, 1, "conv3x3_winograd_f32");
  if (!c.clipped && !near(winograd, expected, c.poisoned)) return "Winograd is off";
  Case forced = clean;
  forced.spec.isa = isa;
  forced.spec.threads = 2;
  forced.spec.forced_kernel = "conv3x3_winograd_f32";
  const Executor shared(forced.spec);
  Answer first, second;
  std::thread other([&] { first = answer(shared, forced); });
  second = answer(shared, forced);
  other.join();
  if (!(first == second)) return "two callers disturb each other";
  if (!same_where_clean(first, winograd, c.poisoned)) return "a NaN or a thread changes another row";
  return nullptr;
}

const char* check(uint64_t seed) {
  const Case c = make_case(seed, true), clean = make_case(seed, false);
  const Answer expected = answer(c, "portable", 1, "conv_direct_f32");
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
