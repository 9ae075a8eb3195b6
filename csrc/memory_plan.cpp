#include "memory_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "pack.h"

namespace fastcascade {
namespace {

// A sub-tile's inputs and outputs share the second-level cache with the weights.
constexpr int64_t kSubTileBytes = 384 << 10;
constexpr int64_t kArenaBytes = 4 << 20;  // at most, unless one instance needs more
constexpr int64_t kMaxTileInstances = 16;
constexpr int64_t kCacheLineFloats = 16;

// The largest power of two of instances whose inputs and outputs of this step fit.
int64_t sub_tile_instances(const Network& net, const Step& step) {
  int64_t floats = net.values[step.output].floats;
  for (int64_t v : step.reads()) floats += net.values[v].floats;
  // Weights that do not fit the cache are streamed once per sub-tile. Larger sub-tiles stream them less often.
  const int64_t bytes = 4 * step.weights.size() > kSubTileBytes ? 2 * kSubTileBytes : kSubTileBytes;
  int64_t instances = 1;
  while (2 * instances <= net.tile_instances && 2 * instances * floats * 4 <= bytes) instances *= 2;
  return instances;
}

// A new segment starts where feature maps have become so small that at least twice as many instances fit the cache.
std::vector<Segment> cut_segments(const Network& net) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < net.steps.size(); ++i) {
    const int64_t instances = sub_tile_instances(net, net.steps[i]);
    if (segments.empty() || instances >= 2 * segments.back().sub_tile_instances) {
      segments.push_back({i, i + 1, instances});
    } else {
      segments.back().end = i + 1;
      segments.back().sub_tile_instances = std::min(segments.back().sub_tile_instances, instances);
    }
  }
  return segments;
}

// The segment of every step.
std::vector<size_t> segment_of_steps(const Network& net) {
  std::vector<size_t> segment_of(net.steps.size());
  for (size_t s = 0; s < net.segments.size(); ++s)
    std::fill(segment_of.begin() + net.segments[s].begin, segment_of.begin() + net.segments[s].end, s);
  return segment_of;
}

// The steps during which a value is in use, both inclusive, and the floats that it needs. Logits and features are read
// after the last step.
struct Lifetime {
  size_t begin = 1, end = 0;  // no step: fused away
  int64_t floats = 0;

  bool empty() const { return begin > end; }
  bool overlaps(const Lifetime& o) const { return begin <= o.end && o.begin <= end; }
};

std::vector<Lifetime> first_and_last_uses(const Network& net) {
  std::vector<Lifetime> lives(net.values.size());
  for (size_t i = 0; i < net.steps.size(); ++i) {
    lives[net.steps[i].output] = {i, i, 0};
    for (int64_t v : net.steps[i].reads()) lives[v].end = i;
  }
  for (int64_t v : {net.logits, net.features})
    if (v >= 0) lives[v].end = net.steps.size();
  return lives;
}

// True where the step may write its output over this input, element by element.
bool may_overwrite(const Network& net, const Step& step, int64_t input) {
  const Value &in = net.values[input], &out = net.values[step.output];
  return step.kind == StepKind::elementwise && in.shape == out.shape && in.pitch == out.pitch;
}

// The value in whose place each value is stored: itself, or an input that dies in the step that writes it. Merges the
// lives of values that share a place into that of the first.
std::vector<int64_t> share_places(const Network& net, std::vector<Lifetime>& lives) {
  std::vector<int64_t> place(net.values.size());
  std::iota(place.begin(), place.end(), 0);
  const std::vector<Lifetime> own = lives;
  for (size_t i = 0; i < net.steps.size(); ++i) {
    const Step& step = net.steps[i];
    for (int64_t v : step.inputs) {
      if (own[v].end != i || !may_overwrite(net, step, v)) continue;
      place[step.output] = place[v];
      lives[place[v]].end = own[step.output].end;
      lives[step.output] = Lifetime();
      break;
    }
  }
  return place;
}

// Liveness analysis. All steps of a segment run on one sub-tile before the next, so a value that leaves its segment is
// alive in all of it; this sets Value::holds_tile.
std::vector<Lifetime> find_lifetimes(Network& net, std::vector<int64_t>& place) {
  const std::vector<size_t> segment_of = segment_of_steps(net);
  std::vector<Lifetime> lives = first_and_last_uses(net);
  place = share_places(net, lives);
  for (size_t v = 0; v < lives.size(); ++v) {
    Lifetime& life = lives[v];
    if (life.empty()) continue;
    Value& value = net.values[v];
    const Segment& segment = net.segments[segment_of[life.begin]];
    value.holds_tile = life.end >= segment.end;
    if (value.holds_tile) {
      life.begin = segment.begin;
      if (life.end < net.steps.size()) life.end = net.segments[segment_of[life.end]].end - 1;
    }
    const int64_t instances = value.holds_tile ? net.tile_instances : segment.sub_tile_instances;
    // One vector more, because kernels store whole vectors even where the pitch is narrow.
    life.floats = round_up(value.floats * instances + net.kernels->lanes, kCacheLineFloats);
  }
  return lives;
}

// First fit: each value gets the lowest offset that no value alive at the same time covers. Returns the arena's size.
int64_t place_values(const std::vector<Lifetime>& lives, std::vector<Value>& values) {
  int64_t arena_floats = 0;
  std::vector<size_t> placed;
  for (size_t v = 0; v < lives.size(); ++v) {
    if (lives[v].empty()) continue;
    std::vector<std::pair<int64_t, int64_t>> taken;  // begin, end
    for (size_t other : placed)
      if (lives[other].overlaps(lives[v]))
        taken.push_back({values[other].offset, values[other].offset + lives[other].floats});
    std::sort(taken.begin(), taken.end());
    int64_t offset = 0;
    for (const auto& [begin, end] : taken)
      if (offset + lives[v].floats > begin) offset = std::max(offset, end);
    values[v].offset = offset;
    arena_floats = std::max(arena_floats, offset + lives[v].floats);
    placed.push_back(v);
  }
  return arena_floats;
}

}  // namespace

void plan_memory(Network& net) {
  for (net.tile_instances = kMaxTileInstances;; net.tile_instances /= 2) {
    net.segments = cut_segments(net);
    std::vector<int64_t> place;
    net.arena_floats = place_values(find_lifetimes(net, place), net.values);
    for (size_t v = 0; v < net.values.size(); ++v) {
      net.values[v].holds_tile = net.values[place[v]].holds_tile;
      net.values[v].offset = net.values[place[v]].offset;
    }
    if (net.tile_instances == 1 || net.arena_floats * 4 <= kArenaBytes) break;
  }
  if (net.arena_floats > kMaxFloats)
    throw std::invalid_argument("stage '" + net.name + "' needs " + bytes_text(4 * net.arena_floats) +
                                " for the activations of one instance, expected at most " + bytes_text(4 * kMaxFloats));
}

}  // namespace fastcascade
