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

// More passes do not improve a median. Their times are allocated beforehand, because helpers must not throw.
constexpr size_t kMaxPasses = 64;

// One thread's buffers, and the time of each step in each pass.
struct TimedThread {
  Buffer arena, scratch;
  std::vector<std::vector<double>> seconds;  // [step][pass]
  size_t passes = 0;

  explicit TimedThread(const Network& net)
      : arena(net.arena_floats),
        scratch(net.scratch_floats),
        seconds(net.steps.size(), std::vector<double>(kMaxPasses)) {}

  // The median, because an interrupted pass must not make a step look slow.
  double median(size_t step) {
    const auto begin = seconds[step].begin(), middle = begin + static_cast<std::ptrdiff_t>(passes / 2);
    std::nth_element(begin, middle, begin + static_cast<std::ptrdiff_t>(passes));
    return *middle;
  }
};

// Runs all steps in order, so that each finds in cache what it would find there in a real run.
void run_pass(const Network& net, const Source& source, int64_t instances, TimedThread& thread) {
  for (auto& passes : thread.seconds) passes[thread.passes] = 0;
  Clock::time_point before = Clock::now();
  visit_steps(net, instances, [&](size_t i, int64_t first, int64_t count) {
    const Step& step = net.steps[i];
    run_step(net, step, source, thread.arena.data(), thread.scratch.data(), first, whole_step(step, count));
    const Clock::time_point after = Clock::now();
    thread.seconds[i][thread.passes] += seconds_between(before, after);
    before = after;
  });
}

void run_passes(const Network& net, const Source& source, int64_t instances, double seconds, TimedThread& thread) {
  run_pass(net, source, instances, thread);  // warm-up; overwritten
  const Clock::time_point start = Clock::now();
  do {
    run_pass(net, source, instances, thread);
    ++thread.passes;
  } while (thread.passes < kMaxPasses && seconds_between(start, Clock::now()) < seconds);
}

double source_bytes(const Network& net, const Source& source) {
  const Value& v = net.values[0];
  if (source.features) return 4.0 * static_cast<double>(v.floats);
  return (source.images->bytes ? 1.0 : 4.0) * static_cast<double>(v.shape.size());
}

double step_bytes(const Network& net, const Step& step, const Source& source, int64_t sharing_weights) {
  int64_t floats = net.values[step.output].floats;
  for (int64_t v : step.reads()) floats += net.values[v].floats;
  const int64_t weights = step.weights.size() + static_cast<int64_t>(step.bias.size());
  const double activations = 4.0 * static_cast<double>(floats);
  return activations + 4.0 * static_cast<double>(weights) / static_cast<double>(sharing_weights) +
         (step.kind == StepKind::load ? source_bytes(net, source) : 0.0);
}

}  // namespace

std::vector<StepTime> time_steps(const Network& net, const Source& source, int64_t instances, int threads,
                                 double seconds) {
  std::vector<TimedThread> team;
  try {
    for (int rank = 0; rank < threads; ++rank) team.emplace_back(net);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("no memory is left for the buffers of " + std::to_string(threads) + " threads; try fewer");
  }
  run_on_helpers(threads,
                 [&](int rank, int) { run_passes(net, source, instances, seconds, team[static_cast<size_t>(rank)]); });
  std::vector<StepTime> times(net.steps.size());
  for (const Segment& segment : net.segments)
    for (size_t i = segment.begin; i < segment.end; ++i) {
      // Throughputs of threads add up; a helper that never came has none.
      double per_second = 0;
      for (TimedThread& thread : team)
        if (thread.passes) per_second += static_cast<double>(instances) / thread.median(i);
      const int64_t sharing_weights = std::min(segment.sub_tile_instances, instances);
      times[i] = {step_bytes(net, net.steps[i], source, sharing_weights), 1 / per_second};
    }
  return times;
}

}  // namespace fastcascade
