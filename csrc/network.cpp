#include "network.h"

#include <algorithm>
#include <stdexcept>

#include "fusion.h"
#include "kernel_choice.h"
#include "memory_plan.h"
#include "shapes.h"
#include "step_builder.h"

namespace fastcascade {
namespace {

// Where weights are used fewer than kFewUses times per instance on average, a few instances take as long as reading
// the weights does. It is then faster that all threads read them once, together.
constexpr int64_t kFewUses = 5;
constexpr int64_t kMinRowsPerThread = 5;

// Larger weights do not stay in the last-level cache from one small batch to the next.
constexpr int64_t kCacheResidentBytes = 16 << 20;

// Channels above which weights are streamed for twice as many Winograd tiles at once.
constexpr int64_t kWideChannels = 64;

constexpr int64_t kWorkPerFloat = 16;  // multiplications that take as long as reading or writing a float

void set_work(Network& net) {
  for (Step& step : net.steps) {
    int64_t floats = net.values[step.output].floats;
    for (int64_t v : step.inputs) step.input_floats += net.values[v].floats;
    for (int64_t v : step.reads()) floats += net.values[v].floats;
    step.work = step.macs + kWorkPerFloat * floats;
  }
}

// How often an instance uses each weight of a step.
int64_t weight_uses(const Network& net, const Step& step) {
  const Shape& out = net.shape(step.output);
  return step.kind == StepKind::winograd ? step.work_items : out.h * out.w;
}

bool weights_are_rarely_used(const Network& net) {
  double weights = 0, uses = 0;
  for (const Step& step : net.steps) {
    weights += static_cast<double>(step.weights.size());
    uses += static_cast<double>(step.weights.size()) * static_cast<double>(weight_uses(net, step));
  }
  return uses < kFewUses * weights;
}

int64_t packed_weight_bytes(const Network& net) {
  int64_t floats = 0;
  for (const Step& step : net.steps) floats += step.weights.size();
  return floats * static_cast<int64_t>(sizeof(float));
}

// Room for the flags of invalid instances behind the values, and for what steps on bytes gather.
void finalize_int8(Network& net) {
  for (const Step& step : net.steps) {
    net.scratch_floats = std::max(net.scratch_floats, step.int8.scratch_floats);
    if (step.kind == StepKind::quantize) net.invalid_offset = net.arena_floats;
  }
  if (net.invalid_offset >= 0) net.arena_floats += net.tile_instances;
}

// Sets how many tiles a Winograd pass takes, and drops untransformed weights where it does not pay to keep them.
void finalize_winograd(Network& net) {
  const bool weights_stream = packed_weight_bytes(net) > kCacheResidentBytes;
  net.scratch_floats = 0;
  int64_t zeros = 0;
  for (Step& step : net.steps) {
    if (step.kind != StepKind::winograd) continue;
    Winograd& c = step.winograd;
    c.tiles_per_pass = net.kernels->mr * (weights_stream || c.channels > kWideChannels ? 2 : 1);
    if (!weights_stream) step.untransformed_weights = Buffer();
    c.untransformed_weights = step.untransformed_weights.data();
    zeros = std::max(zeros, c.in_width * c.in_pitch);
    net.scratch_floats = std::max(net.scratch_floats, winograd_scratch(c, *net.kernels));
  }
  net.zeros = Buffer(zeros);
  for (Step& step : net.steps) step.winograd.zeros = net.zeros.data();
}

int64_t kept_weight_bytes(const Network& net) {
  int64_t floats = 0;
  for (const Step& step : net.steps)
    floats += step.weights.size() + step.untransformed_weights.size() + static_cast<int64_t>(step.bias.size());
  return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace

Network build_network(StageSpec spec, const KernelTable& kernels, const Bf16Kernels* bf16_kernels,
                      const std::string& forced) {
  const bool forces_int8 = forced.rfind(kInt8Prefix, 0) == 0;
  const std::string forced_f32 = forces_int8 ? "" : forced;
  check_forced_kernel(forced_f32);
  const std::vector<Shape> shapes = infer_shapes(spec);
  const std::vector<bool> bytes = infer_bytes(spec, shapes.size());
  // Others must not ask the system for registers that only int8 needs.
  const bool has_bytes = std::find(bytes.begin(), bytes.end(), true) != bytes.end();
  const Int8Kernels* int8_kernels = has_bytes || forces_int8 ? &choose_int8_kernels(kernels, forced) : nullptr;
  fuse_operations(spec, shapes);
  fuse_max_pools(spec, shapes, kernels, forced_f32);
  Network net = build_steps(spec, shapes, bytes, kernels, int8_kernels, bf16_kernels, forced_f32);
  set_work(net);
  plan_memory(net);
  net.min_rows_per_thread = weights_are_rarely_used(net) ? kMinRowsPerThread : 1;
  finalize_winograd(net);
  finalize_int8(net);
  net.weight_bytes = kept_weight_bytes(net);
  return net;
}

}  // namespace fastcascade
