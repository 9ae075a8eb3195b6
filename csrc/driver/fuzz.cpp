// Differential fuzzing of the engine without Python: random networks and cascades run on every instruction set
// of this machine, alone and on several threads, and must agree. Built with the sanitizers by tools/fuzz.py.
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

// Sums of small integers are exact in fp32, so that direct kernels must agree bit for bit.
class RandomStage {
 public:
  RandomStage(Random& random, Shape input, int64_t classes) : random_(random), shape_(input) {
    stage_.name = "fuzz";
    stage_.input = input;
    const int64_t layers = random.upto(1, 4);
    for (int64_t i = 0; i < layers; ++i) add_layer();
    stage_.features = value_;
    stage_.logits = add_head(classes);
  }
  const StageSpec& spec() const { return stage_; }
  Shape features() const { return features_; }

 private:
  Random& random_;
  StageSpec stage_;
  Shape shape_, features_;
  int64_t value_ = 0;

  OpSpec op(OpKind kind) {
    OpSpec o;
    o.kind = kind;
    o.inputs = {value_};
    o.output = static_cast<int64_t>(stage_.ops.size()) + 1;
    if (random_.chance(50)) o.low = 0.f;
    if (random_.chance(20)) o.high = 6.f;
    return o;
  }

  void push(OpSpec o, Shape out) {
    value_ = o.output;
    shape_ = out;
    stage_.ops.push_back(std::move(o));
  }

  void add_layer() {
    switch (random_.upto(0, 5)) {
      case 0: return add_pool();
      case 1: return add_shift();
      default: return add_conv();
    }
  }

  void add_conv() {
    OpSpec o = op(OpKind::conv2d);
    const bool plain = random_.chance(60);  // 3×3, stride 1: what Winograd takes
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
    if (result == shape_ && random_.chance(50)) o.residual = value_;
    push(std::move(o), result);
  }

  void add_pool() {
    OpSpec o = op(OpKind::pool);
    o.is_max = true;
    o.kernel = {std::min<int64_t>(2, shape_.h), std::min<int64_t>(2, shape_.w)};
    o.stride = o.kernel;
    const Shape result{shape_.c, shape_.h / o.kernel[0], shape_.w / o.kernel[1]};
    push(std::move(o), result);
  }

  void add_shift() {
    OpSpec o = op(OpKind::scale_shift);
    o.weight = random_.integers(shape_.c, 1);
    o.bias = random_.integers(shape_.c, 5);
    push(std::move(o), shape_);
  }

  int64_t add_head(int64_t classes) {
    features_ = shape_;
    OpSpec flat = op(OpKind::flatten);
    push(std::move(flat), {shape_.c * shape_.h * shape_.w, 1, 1});
    OpSpec linear = op(OpKind::linear);
    linear.low = -std::numeric_limits<float>::infinity();
    linear.high = -linear.low;
    linear.weight_shape = {classes, shape_.c, 1, 1};
    linear.weight = random_.integers(classes * shape_.c, 1);
    linear.bias = random_.integers(classes, 3);
    push(std::move(linear), {classes, 1, 1});
    return value_;
  }
};

struct Case {
  CascadeSpec spec;
  std::vector<float> images, thresholds;
  int64_t count;
  Shape shape;
};

Case make_case(uint64_t seed) {
  Random random(seed);
  Case c;
  c.shape = {random.upto(1, 20), random.upto(1, 13), random.upto(1, 13)};
  c.spec.classes = random.upto(2, 6);
  c.spec.combine_mean = random.chance(50);
  c.spec.forced_kernel = "conv_direct_f32";
  const int64_t stages = random.upto(1, 3);
  Shape input = c.shape;
  for (int64_t k = 0; k < stages; ++k) {
    const bool previous = k > 0 && random.chance(50);
    RandomStage stage(random, previous ? input : c.shape, c.spec.classes);
    c.spec.stages.push_back(stage.spec());
    c.spec.stages.back().reads_previous = previous;
    if (previous) c.spec.stages[static_cast<size_t>(k) - 1].keeps_features = true;
    input = stage.features();
    Selector selector;
    if (k + 1 < stages) selector.score = Score::margin;
    c.spec.selectors.push_back(selector);
    if (k + 1 < stages) c.thresholds.push_back(static_cast<float>(random.upto(0, 30)) + 0.5f);
  }
  c.count = random.chance(50) ? random.upto(0, 8) : random.upto(9, 120);
  c.images = random.integers(c.count * c.shape.c * c.shape.h * c.shape.w, 3);
  return c;
}

struct Answer {
  std::vector<float> log_probs;
  std::vector<int64_t> label, exit_stage;
  bool operator==(const Answer& o) const {
    return label == o.label && exit_stage == o.exit_stage && log_probs.size() == o.log_probs.size() &&
           !std::memcmp(log_probs.data(), o.log_probs.data(), log_probs.size() * sizeof(float));
  }
};

Answer answer(const Executor& executor, const Case& c) {
  const auto n = static_cast<size_t>(c.count);
  Answer a{std::vector<float>(n * static_cast<size_t>(c.spec.classes)), std::vector<int64_t>(n),
           std::vector<int64_t>(n)};
  const int64_t area = c.shape.h * c.shape.w;
  const Images images{c.images.data(), false, nullptr, c.count, {c.shape.c * area, area, c.shape.w, 1}};
  executor.run(images, c.thresholds.data(), {a.log_probs.data(), a.label.data(), a.exit_stage.data()});
  return a;
}

Answer answer(Case c, const char* isa, int threads, const char* kernel) {
  c.spec.isa = isa;
  c.spec.threads = threads;
  c.spec.forced_kernel = kernel;
  return answer(Executor(c.spec), c);
}

// Winograd rounds, so that only its own schedule is held to the bit; a corrupt value would be far off.
bool near(const Answer& a, const Answer& b) {
  for (size_t i = 0; i < a.label.size(); ++i) {
    if (a.exit_stage[i] != b.exit_stage[i]) continue;  // scores are integers apart from rounding
    const size_t classes = a.log_probs.size() / a.label.size();
    for (size_t j = i * classes; j < (i + 1) * classes; ++j)
      if (!(std::fabs(a.log_probs[j] - b.log_probs[j]) <= 1e-3f * (10.f + std::fabs(b.log_probs[j])))) return false;
  }
  return true;
}

const char* check(uint64_t seed) {
  const Case c = make_case(seed);
  const Answer expected = answer(c, "portable", 1, "conv_direct_f32");
  for (const Isa& isa : isas()) {
    if (!isa.table || !isa.supported()) continue;
    if (!(answer(c, isa.name, 1, "conv_direct_f32") == expected)) return "direct kernels differ";
    if (!(answer(c, isa.name, 3, "conv_direct_f32") == expected)) return "threads change the answer";
    const Answer winograd = answer(c, isa.name, 1, "conv3x3_winograd_f32");
    if (!near(winograd, expected)) return "Winograd is off";
    Case forced = c;
    forced.spec.isa = isa.name;
    forced.spec.threads = 2;
    forced.spec.forced_kernel = "conv3x3_winograd_f32";
    const Executor shared(forced.spec);
    Answer first, second;
    std::thread other([&] { first = answer(shared, forced); });
    second = answer(shared, forced);
    other.join();
    if (!(first == winograd) || !(second == winograd)) return "two callers disturb each other";
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
