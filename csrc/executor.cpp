#include "executor.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "depth_first_schedule.h"
#include "run_context.h"
#include "run_step.h"
#include "team_schedule.h"
#include "threads.h"

namespace fastcascade {
namespace {

// Copies one instance of a value from NHWC to (C, H, W), without padded channels.
void copy_as_chw(const Value& v, const float* from, float* to) {
  const int64_t area = v.shape.h * v.shape.w;
  for (int64_t p = 0; p < area; ++p)
    for (int64_t c = 0; c < v.shape.c; ++c) to[c * area + p] = from[p * v.pitch + c];
}

}  // namespace

Executor::Executor(const CascadeSpec& spec) : program_(build_program(spec)) {}

Executor::~Executor() {
  for (auto& spare : spare_) delete spare.load();
}

std::unique_ptr<RunContext> Executor::take_context(int64_t instances) const {
  std::unique_ptr<RunContext> context;
  for (auto& spare : spare_)
    if (!context) context.reset(spare.exchange(nullptr));
  try {
    if (!context) context = std::make_unique<RunContext>(program_);
    context->start_batch(program_, instances);
  } catch (const std::bad_alloc&) {
    const std::string batches = instances > 1 ? "batches of " + std::to_string(instances / 2) + " or " : "";
    throw OutOfMemory("no memory is left for " + std::to_string(instances) + " images on " +
                      std::to_string(program_.threads) + " threads; try " + batches + "fewer threads");
  }
  return context;
}

void Executor::return_context(std::unique_ptr<RunContext> context) const {
  for (auto& spare : spare_) {
    RunContext* empty = nullptr;
    if (spare.compare_exchange_strong(empty, context.get())) {
      context.release();
      return;
    }
  }
}

void Executor::run(const Images& images, const float* thresholds, const Results& results) const {
  if (images.count == 0) return;
  std::unique_ptr<RunContext> context = take_context(images.count);
  const CascadeRun run(program_, *context, images, thresholds, results);
  if (images.count <= program_.team_instances())
    run_team_schedule(run);
  else
    run_depth_first_schedule(run);
  return_context(std::move(context));
}

void Executor::run_stage(size_t stage, const Images& input, float* logits, float* features) const {
  if (input.count == 0) return;
  const Network& net = program_.networks[stage];
  std::unique_ptr<RunContext> context = take_context(input.count);
  std::vector<int64_t>& index = context->queues[0].instances;
  index.resize(static_cast<size_t>(input.count));
  std::iota(index.begin(), index.end(), 0);
  const int64_t feature_floats = program_.features_shape(stage).size();
  std::atomic<int64_t> next{0};
  const auto work = [&](int rank, int) {
    ThreadBuffers& buffers = context->buffers[static_cast<size_t>(rank)];
    float* arena = buffers.arena.data();
    for (int64_t first; (first = next.fetch_add(net.tile_instances)) < input.count;) {
      const int64_t count = std::min(net.tile_instances, input.count - first);
      const Source source{&input, nullptr, 0, index.data() + first};
      run_steps(net, source, arena, buffers.scratch.data(), count);
      for (int64_t i = 0; i < count; ++i) {
        copy_as_chw(net.values[net.logits], value_of_instance(net, net.logits, arena, i),
                    logits + (first + i) * program_.classes);
        if (features)
          copy_as_chw(net.values[net.features], value_of_instance(net, net.features, arena, i),
                      features + (first + i) * feature_floats);
      }
    }
  };
  run_on_helpers(static_cast<int>(program_.threads), std::ref(work));
  return_context(std::move(context));
}

}  // namespace fastcascade
