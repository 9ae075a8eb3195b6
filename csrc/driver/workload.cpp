// A fixed workload: small cascades that together use every kernel and both schedules. Prints the allocations of a warm
// call. tools/count_instructions.py counts the instructions of measured_run under callgrind.
//
//   workload ISA THREADS   prints "CASE ALLOCATIONS" for every case; exits 2 where the ISA cannot run
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "../executor.h"

namespace {
std::atomic<int64_t> allocations{0};
}

void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) {
  ++allocations;
  void* p = nullptr;
  return posix_memalign(&p, alignment, size) ? nullptr : p;
}

namespace fastcascade {
namespace {

// Pseudo-random numbers between −1 and 1.
std::vector<float> numbers(int64_t count) {
  std::vector<float> v;
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    v.push_back(static_cast<float>(state >> 8) / 8388608.f - 1.f);
  }
  return v;
}

// Builds a stage, operation by operation.
class StageWriter {
 public:
  explicit StageWriter(Shape input) : shape_(input) { stage_.input = input; }

  void conv(int64_t out, int64_t kernel, int64_t stride, int64_t groups = 1, bool residual = false) {
    OpSpec o = op(OpKind::conv2d);
    o.activation.low = 0.f;
    o.kernel = {kernel, kernel};
    o.stride = {stride, stride};
    o.padding = {kernel / 2, kernel / 2, kernel / 2, kernel / 2};
    o.groups = groups;
    o.weight_shape = {out, shape_.c / groups, kernel, kernel};
    o.weight = numbers(out * o.weight_shape[1] * kernel * kernel);
    for (float& w : o.weight) w *= 0.2f;
    o.bias.assign(static_cast<size_t>(out), 0.1f);
    if (residual) o.residual = value();
    const auto side = [&](int64_t size) { return (size + 2 * (kernel / 2) - kernel) / stride + 1; };
    push(std::move(o), {out, side(shape_.h), side(shape_.w)});
  }

  void pool(bool is_max, int64_t kernel, int64_t stride) {
    OpSpec o = op(OpKind::pool);
    o.is_max = is_max;
    o.kernel = {kernel, kernel};
    o.stride = {stride, stride};
    push(std::move(o), {shape_.c, (shape_.h - kernel) / stride + 1, (shape_.w - kernel) / stride + 1});
  }

  void pad() {
    OpSpec o = op(OpKind::pad);
    o.before = {1, 1, 1};
    o.after = {2, 1, 1};
    push(std::move(o), {shape_.c + 3, shape_.h + 2, shape_.w + 2});
  }

  void slice() {
    OpSpec o = op(OpKind::slice);
    o.stop = {shape_.c, shape_.h, shape_.w};
    o.step = {1, 2, 2};
    push(std::move(o), {shape_.c, (shape_.h + 1) / 2, (shape_.w + 1) / 2});
  }

  void concat() {
    OpSpec o = op(OpKind::concat);
    o.inputs.push_back(value());
    push(std::move(o), {2 * shape_.c, shape_.h, shape_.w});
  }

  StageSpec finish(int64_t classes) {
    stage_.features = value();
    push(op(OpKind::flatten), {shape_.c * shape_.h * shape_.w, 1, 1});
    OpSpec o = op(OpKind::linear);
    o.weight_shape = {classes, shape_.c, 1, 1};
    o.weight = numbers(classes * shape_.c);
    o.bias.assign(static_cast<size_t>(classes), 0.f);
    push(std::move(o), {classes, 1, 1});
    stage_.logits = value();
    return stage_;
  }

 private:
  StageSpec stage_;
  Shape shape_;

  int64_t value() const { return static_cast<int64_t>(stage_.ops.size()); }
  OpSpec op(OpKind kind) const {
    OpSpec o;
    o.kind = kind;
    o.inputs = {value()};
    o.output = value() + 1;
    return o;
  }
  void push(OpSpec o, Shape out) {
    shape_ = out;
    stage_.ops.push_back(std::move(o));
  }
};

constexpr int64_t kClasses = 10;
constexpr Shape kImage{3, 12, 12};

StageSpec winograd_stage() {
  StageWriter s(kImage);
  s.conv(16, 3, 1);
  for (int i = 0; i < 3; ++i) s.conv(16, 3, 1, 1, true);
  s.pool(false, 12, 12);
  return s.finish(kClasses);
}

StageSpec direct_stage() {
  StageWriter s(kImage);
  s.conv(8, 5, 1);
  s.conv(24, 3, 2);
  s.conv(24, 1, 1, 1, true);
  s.pool(false, 6, 6);
  return s.finish(kClasses);
}

StageSpec light_stage() {
  StageWriter s(kImage);
  s.conv(32, 1, 1);
  s.conv(32, 3, 1, 32);
  s.conv(32, 3, 1, 4);
  s.pool(true, 2, 2);
  s.pool(false, 6, 6);
  return s.finish(kClasses);
}

StageSpec layout_stage() {
  StageWriter s(kImage);
  s.pad();
  s.concat();
  s.slice();
  return s.finish(kClasses);
}

// Weights so large that a single Winograd pass transforms them on the call.
StageSpec large_stage() {
  StageWriter s(kImage);
  s.pool(false, 3, 3);
  s.conv(256, 1, 1);
  s.conv(512, 3, 1);
  s.pool(false, 4, 4);
  return s.finish(kClasses);
}

struct Case {
  const char* name;
  std::vector<StageSpec> stages;
  int64_t count;
  bool bytes;
  float threshold;
};

// In the two cascades some images stop at the first exit. Threads have shares of whole tiles in "cascade"; in "few"
// they also share steps.
std::vector<Case> cases() {
  return {
      {"winograd", {winograd_stage()}, 6, false, 0.f},
      {"direct", {direct_stage()}, 6, false, 0.f},
      {"light", {light_stage()}, 6, false, 0.f},
      {"layout", {layout_stage()}, 20, true, 0.f},
      {"large", {large_stage()}, 2, false, 0.f},
      {"cascade", {direct_stage(), winograd_stage()}, 100, true, 0.4f},
      {"few", {light_stage(), direct_stage()}, 7, true, 0.53f},
  };
}

CascadeSpec cascade_of(const Case& c, const char* isa, int threads) {
  CascadeSpec spec;
  spec.stages = c.stages;
  spec.selectors.resize(c.stages.size());
  if (c.stages.size() > 1) spec.selectors[0].score = Score::margin;
  spec.classes = kClasses;
  spec.stage_weights.assign(c.stages.size(), 1.f);
  spec.isa = isa;
  spec.threads = threads;
  return spec;
}

struct Call {
  std::vector<float> floats, table, log_probs;
  std::vector<uint8_t> bytes;
  std::vector<int64_t> label, exit_stage;
  Images images;

  explicit Call(const Case& c)
      : table(numbers(kImage.c * 256)),
        log_probs(static_cast<size_t>(c.count * kClasses)),
        label(static_cast<size_t>(c.count)),
        exit_stage(label) {
    const int64_t area = kImage.h * kImage.w;
    floats = numbers(c.count * kImage.c * area);
    for (float x : floats) bytes.push_back(static_cast<uint8_t>((x + 1.f) * 127.f));
    images = {nullptr, c.bytes, table.data(), c.count, {kImage.c * area, area, kImage.w, 1}};
    images.data = c.bytes ? static_cast<const void*>(bytes.data()) : floats.data();
  }
};

}  // namespace
}  // namespace fastcascade

extern "C" __attribute__((noinline)) void measured_run(const fastcascade::Executor& executor, fastcascade::Call& call,
                                                       float threshold) {
  executor.run(call.images, &threshold, {call.log_probs.data(), call.label.data(), call.exit_stage.data()});
}

int main(int argc, char** argv) {
  using namespace fastcascade;
  if (argc != 3) return 2;
  try {
    choose_isa(argv[1]);
  } catch (const std::invalid_argument& error) {
    std::puts(error.what());
    return 2;
  }
  for (const Case& c : cases()) {
    const Executor executor(cascade_of(c, argv[1], std::atoi(argv[2])));
    Call call(c);
    const float threshold = c.threshold;
    for (int i = 0; i < 2; ++i)
      executor.run(call.images, &threshold, {call.log_probs.data(), call.label.data(), call.exit_stage.data()});
    const int64_t before = allocations.load();
    measured_run(executor, call, threshold);
    int64_t stopped = 0;
    for (int64_t stage : call.exit_stage) stopped += stage == 0;
    std::printf("%s %lld (%lld of %lld stop first)\n", c.name, static_cast<long long>(allocations.load() - before),
                static_cast<long long>(stopped), static_cast<long long>(c.count));
  }
  return 0;
}
