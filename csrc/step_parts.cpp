#include "step_parts.h"

#include <algorithm>

namespace fastcascade {
namespace {

// A part must take much longer than its threads need to agree that it is done, some 0.2 µs.
constexpr int64_t kMinPartWork = 200'000;  // multiplications: about 4 µs
constexpr int64_t kWorkPerFloat = 16;      // reading or writing a float takes as long as this many multiplications

int64_t work_of(const Network& net, const Step& step) {
  int64_t floats = net.values[step.output].floats;
  for (int64_t v : step.reads()) floats += net.values[v].floats;
  return step.macs + kWorkPerFloat * floats;
}

Range nth_of(int64_t count, int64_t parts, int64_t index) {
  return {count * index / parts, count * (index + 1) / parts};
}

// Rows of a chain's last output that are computed together, over all instances.
int64_t chain_lines(const Network& net, const Unit& chain, int64_t instances) {
  const Step& last = net.steps[chain.end - 1];
  return instances * ((net.shape(last.output).h + last.row_window.rows_per_line - 1) / last.row_window.rows_per_line);
}

}  // namespace

UnitCut cut_unit(const Network& net, const Unit& unit, int64_t instances, int64_t threads) {
  // Two parts per thread, so that a thread that is late leaves one to the others, unless they would be too small.
  if (unit.is_chain()) return {std::min(chain_lines(net, unit, instances), max_parts(threads)), false};
  const Step& step = net.steps[unit.begin];
  const int64_t positions = step.work_items * instances;
  // Panels where positions are too few to fill the register tiles of all threads.
  const bool along_panels = positions < threads * step.min_items && step.panels >= threads;
  const int64_t cuttable = along_panels ? step.panels : positions;
  const int64_t worth = std::max<int64_t>(1, work_of(net, step) * instances / kMinPartWork);
  const int64_t most = along_panels || positions >= 2 * threads * step.min_items ? max_parts(threads) : threads;
  return {std::min({cuttable, worth, most}), along_panels};
}

StepPart part_of(const Step& step, int64_t instances, UnitCut cut, int64_t index) {
  StepPart part = whole_step(step, instances);
  Range& range = cut.along_panels ? part.panels : part.positions;
  range = nth_of(range.end, cut.parts, index);
  return part;
}

Range rows_of_part(const Network& net, const Unit& chain, int64_t instances, UnitCut cut, int64_t index) {
  const Step& last = net.steps[chain.end - 1];
  const int64_t per_line = last.row_window.rows_per_line, height = net.shape(last.output).h;
  const int64_t lines = chain_lines(net, chain, 1);
  const auto row = [&](int64_t line) { return line / lines * height + std::min(line % lines * per_line, height); };
  const Range part = nth_of(instances * lines, cut.parts, index);
  return {row(part.begin), row(part.end)};
}

}  // namespace fastcascade
