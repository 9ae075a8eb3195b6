#include "step_parts.h"

#include <algorithm>

namespace fastcascade {
namespace {

// A part must take much longer than its threads need to agree that it is done, some 0.2 µs.
constexpr int64_t kMinPartWork = 200'000;  // multiplications: about 4 µs

// The index-th of some parts of `count` items. All but the last end at a multiple of `unit`.
Range nth_of(int64_t count, int64_t parts, int64_t index, int64_t unit = 1) {
  const int64_t units = (count + unit - 1) / unit;
  return {units * index / parts * unit, std::min(count, units * (index + 1) / parts * unit)};
}

}  // namespace

StepCut cut_step(const Step& step, int64_t instances, int64_t threads) {
  if (threads == 1) return {1, false};
  const int64_t positions = step.work_items * instances;
  // Panels where positions are too few to fill the register tiles of all threads.
  const bool along_panels = positions < threads * step.min_items && step.panels >= threads;
  const int64_t cuttable = along_panels ? step.panels : positions;
  const int64_t worth = std::max<int64_t>(1, step.work * instances / kMinPartWork);
  // Two parts per thread, so that a thread that is late leaves one to the others, unless they would be too small.
  const int64_t most = along_panels || positions >= 2 * threads * step.min_items ? max_parts(threads) : threads;
  return {std::min({cuttable, worth, most}), along_panels};
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
