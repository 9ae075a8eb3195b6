// The exit head: what happens to one row of logits. kernels/reference.py is the definition.
#pragma once

#include <cstdint>
#include <vector>

namespace fastcascade {

enum class Score { mlp_stats, mlp_topk, mlp_probs, max_prob, margin, entropy, none };

// How an exit scores stopping; `none` at the last exit, where everything stops.
struct Selector {
  Score score = Score::none;
  int64_t features = 0, hidden = 0;
  std::vector<float> mean, std, w1, b1, w2;  // w1 is [hidden][features]
  float b2 = 0.f;
};

// State and results of a batch, one row per instance.
struct ExitTables {
  float* log_sum;           // [N][classes], log of the weighted sum of probabilities; used with a stage weight only
  float* weight_sum;        // of the valid stages so far; used with a stage weight only
  int32_t* previous_label;  // of the previous stage, -1 where it was invalid
  float* log_probs;         // [N][classes]
  int64_t* label;
  int64_t* exit_stage;
};

// Combines, scores, decides and retires one row. `work` has 3 * classes + features floats.
// `stage_weight` is this stage's in the mean of the stages; 0: the answer is this stage's alone.
// Returns true where the row stays active.
bool exit_row(const ExitTables& tables, const float* logits, int64_t row, int64_t stage, int64_t classes,
              float stage_weight, const Selector& selector, float threshold, float* work);

}  // namespace fastcascade
