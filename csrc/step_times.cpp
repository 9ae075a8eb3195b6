#include "step_times.h"

#include <algorithm>
#include <chrono>

#include "threads.h"

namespace fastcascade {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// More do not make a median better. Room for them is made beforehand: helpers must not run out of memory.
constexpr size_t kMaxPasses = 64;

// One thread's buffers, and what each step took in each pass.
struct Worker {
  Buffer arena, scratch;
  std::vector<std::vector<double>> seconds;  // [step][pass]
  size_t passes = 0;

  explicit Worker(const Network& net)
      : arena(net.arena_floats),
        scratch(net.scratch_floats),
        seconds(net.steps.size(), std::vector<double>(kMaxPasses)) {}

  // A pass that the machine interrupted must not make a step look slow.
  double median(size_t step) {
    const auto begin = seconds[step].begin(), middle = begin + static_cast<std::ptrdiff_t>(passes / 2);
    std::nth_element(begin, middle, begin + static_cast<std::ptrdiff_t>(passes));
    return *middle;
  }
};

// All steps in the order of a run, so that each finds in cache what it would find there.
void run_pass(const Network& net, const Source& source, int64_t instances, Worker& worker) {
  for (auto& passes : worker.seconds) passes[worker.passes] = 0;
  Clock::time_point before = Clock::now();
  run_steps(net, source, worker.arena.data(), worker.scratch.data(), instances, {}, [&](size_t i) {
    const Clock::time_point after = Clock::now();
    worker.seconds[i][worker.passes] += seconds_between(before, after);
    before = after;
  });
}

void run_passes(const Network& net, const Source& source, int64_t instances, double seconds, Worker& worker) {
  run_pass(net, source, instances, worker);  // warms up, and is written over
  const Clock::time_point start = Clock::now();
  do {
    run_pass(net, source, instances, worker);
    ++worker.passes;
  } while (worker.passes < kMaxPasses && seconds_between(start, Clock::now()) < seconds);
}

double bytes_read_from(const Network& net, const Source& source) {
  const Value& v = net.values[0];
  if (source.features) return 4.0 * static_cast<double>(v.floats);
  return (source.bytes ? 1.0 : 4.0) * static_cast<double>(v.shape.c * v.shape.h * v.shape.w);
}

double bytes_of(const Network& net, const Step& step, const Source& source, int64_t sharing_weights) {
  int64_t floats = net.values[step.output].floats;
  for (int64_t v : step.inputs) floats += net.values[v].floats;
  if (step.residual >= 0) floats += net.values[step.residual].floats;
  const int64_t weights = step.weights.size() + static_cast<int64_t>(step.bias.size());
  const double maps = 4.0 * static_cast<double>(floats);
  return maps + 4.0 * static_cast<double>(weights) / static_cast<double>(sharing_weights) +
         (step.kind == StepKind::load ? bytes_read_from(net, source) : 0.0);
}

}  // namespace

std::vector<StepTime> time_steps(const Network& net, const Source& source, int64_t instances, int threads,
                                 double seconds) {
  std::vector<Worker> workers;
  for (int rank = 0; rank < threads; ++rank) workers.emplace_back(net);
  run_on_helpers(threads,
                 [&](int rank) { run_passes(net, source, instances, seconds, workers[static_cast<size_t>(rank)]); });
  std::vector<StepTime> times(net.steps.size());
  for (const Segment& segment : net.segments)
    for (size_t i = segment.begin; i < segment.end; ++i) {
      // Threads add up in instances a second; a helper that never came adds none.
      double per_second = 0;
      for (Worker& w : workers)
        if (w.passes) per_second += static_cast<double>(instances) / w.median(i);
      const int64_t sharing_weights = std::min(segment.instances, instances);
      times[i] = {bytes_of(net, net.steps[i], source, sharing_weights), 1 / per_second};
    }
  return times;
}

}  // namespace fastcascade
