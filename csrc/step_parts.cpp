#include "step_parts.h"

#include <algorithm>

namespace fastcascade {
namespace {

// Multiplications. A part must take much longer than its threads need to agree that it is done, some 0.2 µs.
constexpr int64_t kMinPartWork = 200'000;  // about 4 µs

// From this on a thread's share is cut in two, so that a thread that is late leaves one part to the others.
constexpr int64_t kMinShareWork = 2'000'000;

// Weights of more floats do not stay in a thread's second-level cache from one part to the next.
constexpr int64_t kCachedWeights = 96 << 10;

// Every part along positions reads all weights, and may transform them; every part along panels does so with inputs.
bool is_cut_along_panels(const Step& step, int64_t instances, int64_t threads) {
  const bool few_positions = step.work_items * instances < threads * step.min_items;  // for full register tiles
  const bool large_weights = step.weights.size() > std::max(kCachedWeights, 4 * step.input_floats * instances);
  return step.panels >= threads && (few_positions || large_weights);
}

// The index-th of some parts of `count` items. All but the last end at a multiple of `unit`.
Range nth_of(int64_t count, int64_t parts, int64_t index, int64_t unit = 1) {
  const int64_t units = (count + unit - 1) / unit;
  return {units * index / parts * unit, std::min(count, units * (index + 1) / parts * unit)};
}

}  // namespace

StepCut cut_step(const Step& step, int64_t instances, int64_t threads) {
  if (threads == 1) return {1, false};
  const int64_t positions = step.work_items * instances, work = step.work * instances;
  const int64_t worth = std::max<int64_t>(1, work / kMinPartWork);
  if (is_cut_along_panels(step, instances, threads)) return {std::min(threads, worth), true};
  const bool twice = positions >= 2 * threads * step.min_items && work >= threads * kMinShareWork;
  return {std::min({positions, worth, twice ? 2 * threads : threads}), false};
}

StepPart part_of(const Step& step, int64_t instances, StepCut cut, int64_t index) {
  StepPart part = whole_step(step, instances);
  if (cut.along_panels) {
    part.panels = nth_of(step.panels, cut.parts, index);
  } else {
    const int64_t positions = part.positions.end;
    // Larger parts consist of full register tiles; of smaller ones, equal sizes matter more.
    const int64_t unit = positions >= 2 * cut.parts * step.min_items ? step.min_items : 1;
    part.positions = nth_of(positions, cut.parts, index, unit);
  }
  return part;
}

}  // namespace fastcascade
