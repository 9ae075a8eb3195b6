#include "cascade_run.h"

#include <algorithm>

namespace fastcascade {

CascadeRun::CascadeRun(const Program& p, RunContext& c, const Images& batch, const float* thresholds,
                       const Results& results)
    : program(p),
      context(c),
      images(batch),
      thresholds_(thresholds),
      tables_{c.log_sum.data(),  c.weight_sum.data(), c.previous_label.data(),
              results.log_probs, results.label,       results.exit_stage} {}

Source CascadeRun::source(size_t stage, const int64_t* instances, const int64_t* slots) const {
  if (!program.networks[stage].reads_previous()) return {&images, nullptr, 0, instances};
  const Network& previous = program.networks[stage - 1];
  return {nullptr, context.features[stage - 1].data(), previous.values[previous.features].floats, slots};
}

bool CascadeRun::survives_exit(size_t stage, const float* arena, int64_t position, int64_t instance,
                               Buffer& work) const {
  const Network& net = program.networks[stage];
  const float threshold = stage + 1 < stages() ? thresholds_[stage] : 0.f;
  const float weight = program.stage_weights.empty() ? 0.f : program.stage_weights[stage];
  return run_exit_head(tables_, value_of_instance(net, net.logits, arena, position), instance,
                       static_cast<int64_t>(stage), program.classes, weight, program.selectors[stage], threshold,
                       work.data());
}

void CascadeRun::save_features(size_t stage, const float* arena, int64_t position, int64_t slot) const {
  const Network& net = program.networks[stage];
  if (net.features < 0) return;
  const int64_t floats = net.values[net.features].floats;
  std::copy_n(value_of_instance(net, net.features, arena, position), floats,
              context.features[stage].data() + slot * floats);
}

}  // namespace fastcascade
