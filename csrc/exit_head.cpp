#include "exit_head.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastcascade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLogOddsLimit = 30.f;
constexpr int64_t kNoClass = -1;

bool all_finite(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}

int64_t arg_max(const float* x, int64_t n) { return std::max_element(x, x + n) - x; }

// log Σ exp x over all entries but `skip`, summed in double.
float log_sum_exp(const float* x, int64_t n, int64_t skip) {
  float top = -kInfinity;
  for (int64_t i = 0; i < n; ++i)
    if (i != skip) top = std::max(top, x[i]);
  if (top == -kInfinity) return top;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    if (i != skip) sum += std::exp(x[i] - top);
  return top + static_cast<float>(std::log(sum));
}

float log_add_exp(float a, float b) {
  const float high = std::max(a, b), low = std::min(a, b);
  return low == -kInfinity ? high : high + std::log1p(std::exp(low - high));
}

float log_odds(const float* log_probs, int64_t n, int64_t c) {
  const float odds = log_probs[c] - log_sum_exp(log_probs, n, c);
  return std::clamp(odds, -kLogOddsLimit, kLogOddsLimit);
}

float entropy(const float* log_probs, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float p = std::exp(log_probs[i]);
    if (p > 0.f) sum -= static_cast<double>(p) * log_probs[i];
  }
  return static_cast<float>(sum);
}

// The `count` most probable classes; of equal ones, the lowest index first.
void top_classes(const float* log_probs, int64_t n, int64_t count, int64_t* top) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (std::find(top, top + k, i) != top + k) continue;
      if (best < 0 || log_probs[i] > log_probs[best]) best = i;
    }
    top[k] = best;
  }
}

void write_features(Score score, const float* log_probs, int64_t n, float agreement, float* out) {
  if (score == Score::mlp_probs) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::exp(log_probs[i]);
    return;
  }
  const int64_t count = score == Score::mlp_topk ? 3 : 2;
  int64_t top[3];
  top_classes(log_probs, n, count, top);
  for (int64_t k = 0; k < count; ++k) *out++ = log_odds(log_probs, n, top[k]);
  if (score == Score::mlp_stats) *out++ = entropy(log_probs, n);
  *out = agreement;
}

float mlp_score(const Selector& s, const float* features) {
  float score = s.b2;
  for (int64_t h = 0; h < s.hidden; ++h) {
    float sum = s.b1[h];
    for (int64_t f = 0; f < s.features; ++f) sum += s.w1[h * s.features + f] * ((features[f] - s.mean[f]) / s.std[f]);
    score += s.w2[h] * std::max(sum, 0.f);
  }
  return score;
}

float stop_score(const Selector& s, const float* log_probs, int64_t n, float agreement, float* features) {
  int64_t top[2];
  switch (s.score) {
    case Score::entropy: return -entropy(log_probs, n);
    case Score::max_prob: return log_odds(log_probs, n, arg_max(log_probs, n));
    case Score::margin: top_classes(log_probs, n, 2, top); return log_probs[top[0]] - log_probs[top[1]];
    default: write_features(s.score, log_probs, n, agreement, features); return mlp_score(s, features);
  }
}

// Writes the instance's result; `log_probs` is null where the last exit is invalid.
void retire(const ExitTables& t, int64_t instance, int64_t stage, int64_t n, const float* log_probs) {
  float* out = t.log_probs + instance * n;
  if (log_probs)
    std::copy_n(log_probs, n, out);
  else
    std::fill_n(out, n, std::numeric_limits<float>::quiet_NaN());
  t.label[instance] = log_probs ? arg_max(log_probs, n) : -1;
  t.exit_stage[instance] = stage;
}

}  // namespace

bool run_exit_head(const ExitTables& t, const float* logits, int64_t instance, int64_t stage, int64_t classes,
                   float stage_weight, const Selector& selector, float threshold, float* work) {
  const bool last = selector.score == Score::none;
  if (!all_finite(logits, classes)) {
    t.previous_label[instance] = -1;
    if (last) retire(t, instance, stage, classes, nullptr);
    return !last;
  }
  float *own = work, *combined = work + classes, *features = work + 2 * classes;
  const float total = log_sum_exp(logits, classes, kNoClass);
  for (int64_t i = 0; i < classes; ++i) own[i] = logits[i] - total;
  const int64_t own_label = arg_max(own, classes);
  const float agreement = own_label == t.previous_label[instance] ? 1.f : 0.f;
  t.previous_label[instance] = static_cast<int32_t>(own_label);
  if (stage_weight > 0.f) {
    float* log_sum = t.log_sum + instance * classes;
    const float log_weight = std::log(stage_weight), log_weight_sum = std::log(t.weight_sum[instance] += stage_weight);
    for (int64_t i = 0; i < classes; ++i) {
      log_sum[i] = log_add_exp(log_sum[i], own[i] + log_weight);
      combined[i] = log_sum[i] - log_weight_sum;
    }
  } else {
    std::copy_n(own, classes, combined);
  }
  const bool stop = last || stop_score(selector, combined, classes, agreement, features) >= threshold;
  if (stop) retire(t, instance, stage, classes, combined);
  return !stop;
}

}  // namespace fastcascade
