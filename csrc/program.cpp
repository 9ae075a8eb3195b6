#include "program.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fastcascade {
namespace {

constexpr int kMaxThreads = 1024;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_mlp(const Selector& s, const std::string& where, int64_t classes) {
  const int64_t features = s.score == Score::mlp_probs ? classes : 4;
  const auto size = [](const std::vector<float>& v) { return static_cast<int64_t>(v.size()); };
  const bool features_fit = s.features == features && size(s.mean) == features && size(s.std) == features;
  const bool hidden_fits = s.hidden >= 1 && size(s.b1) == s.hidden && size(s.w2) == s.hidden &&
                           size(s.w1) / s.hidden == features && size(s.w1) % s.hidden == 0;
  if (!features_fit || !hidden_fits)
    fail(where + ": weights do not fit " + std::to_string(features) + " features and " + std::to_string(s.hidden) +
         " hidden units");
}

void check_selector(const Selector& s, size_t stage, bool last, int64_t classes) {
  const std::string where = "selector " + std::to_string(stage);
  if (last && s.score != Score::none) fail(where + ": the last stage has none");
  if (last) return;
  if (s.score == Score::none) fail(where + " is missing");
  if (classes < 2) fail(where + ": a selector needs at least 2 classes");
  if (s.score == Score::mlp_topk && classes < 3) fail(where + ": features 'topk' need at least 3 classes");
  if (s.score == Score::mlp_stats || s.score == Score::mlp_topk || s.score == Score::mlp_probs)
    check_mlp(s, where, classes);
}

void check_spec(const CascadeSpec& spec) {
  if (spec.stages.empty() || spec.stages.size() != spec.selectors.size())
    fail("expected at least one stage and a selector entry for each");
  if (!spec.stage_weights.empty() && spec.stage_weights.size() != spec.stages.size())
    fail(std::to_string(spec.stage_weights.size()) + " stage weights for " + std::to_string(spec.stages.size()) +
         " stages");
  for (const float weight : spec.stage_weights)
    if (!(weight > 0.f) || std::isinf(weight))
      fail("a stage weight is " + std::to_string(weight) + ", expected a positive number");
  if (spec.threads < 1 || spec.threads > kMaxThreads)
    fail("threads is " + std::to_string(spec.threads) + ", expected 1 to " + std::to_string(kMaxThreads));
  for (size_t k = 0; k < spec.stages.size(); ++k)
    check_selector(spec.selectors[k], k, k + 1 == spec.stages.size(), spec.classes);
}

void check_input(const Program& program, const StageSpec& stage) {
  if (stage.input_kind != StageInput::previous) return;
  if (program.networks.empty()) fail("the first stage cannot read a previous one");
  const Shape features = program.features_shape(program.networks.size() - 1);
  if (!(stage.input == features))
    fail("stage '" + stage.name + "' reads features of shape " + stage.input.text() + ", but the stage before gives " +
         features.text());
}

void check_logits(const Network& net, int64_t classes) {
  const Shape& logits = net.shape(net.logits);
  if (!(logits == Shape{classes, 1, 1}))
    fail("stage '" + net.name + "' ends in logits of shape " + logits.text() + ", expected " + std::to_string(classes) +
         " classes");
}

void check_memory(const Program& program) {
  const int64_t available = available_bytes();
  int64_t threads = program.threads;
  while (threads > 0 && program.buffer_bytes(threads) > available) threads /= 2;
  if (threads == program.threads) return;
  throw OutOfMemory("its buffers need " + bytes_text(program.buffer_bytes(program.threads)) + " for " +
                    std::to_string(program.threads) + " threads, but " + bytes_text(available) + " are left; " +
                    (threads ? "try threads=" + std::to_string(threads) : "not even one thread fits"));
}

}  // namespace

bool Program::saves_features() const {
  return std::any_of(networks.begin(), networks.end(), [](const Network& net) { return net.features >= 0; });
}

Shape Program::features_shape(size_t stage) const {
  const Network& net = networks[stage];
  return net.features < 0 ? Shape{0, 0, 0} : net.shape(net.features);
}

int64_t Program::buffer_bytes(int64_t with_threads) const {
  int64_t arena = 0, scratch = 0, slot = 0;
  for (const Network& net : networks) {
    arena = std::max(arena, net.arena_floats);
    scratch = std::max(scratch, net.scratch_floats);
    if (net.features >= 0) slot += net.values[net.features].floats;
  }
  return static_cast<int64_t>(sizeof(float)) * (with_threads * (arena + scratch) + feature_slots(with_threads) * slot);
}

int64_t Program::batch_bytes(int64_t instances) const {
  const int64_t probabilities = stage_weights.empty() ? classes : 2 * classes;
  const int64_t queues = 16 * static_cast<int64_t>(networks.size());
  return instances * (4 * probabilities + 24 + queues);
}

Program build_program(const CascadeSpec& spec) {
  check_spec(spec);
  Program program{&choose_isa(spec.isa), {}, spec.selectors, spec.classes, spec.threads, spec.stage_weights, 1};
  const Bf16Kernels* bf16_kernels = spec.in_bf16 ? &choose_bf16_kernels(*program.kernels) : nullptr;
  for (const StageSpec& stage : spec.stages) {
    check_input(program, stage);
    program.networks.push_back(build_network(stage, *program.kernels, bf16_kernels, spec.forced_kernel));
    check_logits(program.networks.back(), spec.classes);
    program.max_tile = std::max(program.max_tile, program.networks.back().tile_instances);
  }
  check_memory(program);
  return program;
}

}  // namespace fastcascade
