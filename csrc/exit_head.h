// The exit head: from one instance's logits to the decision whether it stops. kernels/reference.py defines it.
#pragma once

#include <cstdint>
#include <vector>

namespace fastcascade {

enum class Score { mlp_stats, mlp_topk, mlp_probs, max_prob, margin, entropy, none };

// How an exit computes the stop score. Score::none is the last exit, where everything stops.
struct Selector {
  Score score = Score::none;
  int64_t features = 0, hidden = 0;
  std::vector<float> mean, std, w1, b1, w2;  // w1 is [hidden][features]
  float b2 = 0.f;
};

// State and results of a batch of N instances.
struct ExitTables {
  float* log_sum;           // [N][classes], log of the weighted sum of probabilities; used with stage weights only
  float* weight_sum;        // [N], over the valid stages so far; used with stage weights only
  int32_t* previous_label;  // [N], of the previous stage, -1 where it was invalid
  float* log_probs;         // [N][classes]
  int64_t* label;           // [N]
  int64_t* exit_stage;      // [N]
};

// Floats of work space that run_exit_head needs.
inline int64_t exit_head_floats(int64_t classes) { return 3 * classes + 8; }

// Combines, scores, decides, and retires the instance if it stops. `stage_weight` is this stage's weight in the mean
// over stages, or 0 where each exit answers alone. Returns true if the instance stays active.
bool run_exit_head(const ExitTables& tables, const float* logits, int64_t instance, int64_t stage, int64_t classes,
                   float stage_weight, const Selector& selector, float threshold, float* work);

}  // namespace fastcascade
