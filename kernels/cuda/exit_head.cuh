// The exit head: log-softmax, combination, features, selector, decision, retirement. One warp takes one row at a
// time, its lanes stride over the classes, so any class count fits and every reduction is a butterfly of shuffles.
// Semantics: kernels/reference.py, exit_head.
#pragma once

#include "context.cuh"

namespace fastcascade {

constexpr float kLogOddsLimit = 30;  // as in kernels/reference.py

enum Selector { kLast, kMaxProb, kMargin, kEntropy, kStats, kTopk, kProbs };

// Pointers are device memory; see ExitTables and MLPWeights in kernels/reference.py.
struct ExitArguments {
  const int* index;
  const int* count;
  float* log_sum;
  int* visits;
  int* previous_label;
  float* log_probs;
  long long* label;
  long long* exit_stage;
  const float* threshold;
  const float* mean;
  const float* std;
  const float* w1;
  const float* b1;
  const float* w2;
  const float* b2;
  signed char* keep;
  int* block_counts;
  int stage;
  int selector;
  int mean_of_stages;  // combine="mean"
  int classes;
  int hidden;
};

// The three greatest log-probabilities, the class of the first, and the sum of exp(other − first) over the rest.
struct Top {
  float value[3];
  int label;
  float rest;
};

FC_FUNCTION float exp_relative(float value, float base) { return value > -infinity() ? expf(value - base) : 0.0f; }

FC_FUNCTION Top empty_top() { return {{-infinity(), -infinity(), -infinity()}, 0x7fffffff, 0.0f}; }

// Insert a value whose class is `label`; of equal values the lowest class stays first.
FC_FUNCTION void insert(Top& top, float value, int label) {
  const float before = top.value[0];
  if (value > before || (value == before && label < top.label)) top.label = label;
  for (float& place : top.value) {
    const float greater = fmaxf(place, value);
    value = fminf(place, value);
    place = greater;
  }
  top.rest = top.rest * exp_relative(before, top.value[0]) + exp_relative(value, top.value[0]);
}

FC_FUNCTION void merge(Top& top, const Top& other) {
  const float base = fmaxf(top.value[0], other.value[0]);
  const float rest = top.rest * exp_relative(top.value[0], base) + other.rest * exp_relative(other.value[0], base);
  top.rest = 0.0f;
  insert(top, other.value[0], other.label);
  insert(top, other.value[1], 0x7fffffff);
  insert(top, other.value[2], 0x7fffffff);
  top.rest += rest;
}

template <class Context>
FC_FUNCTION Top warp_top(Context& context, Top top) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Top other;
    for (int i = 0; i < 3; i++) other.value[i] = context.shuffle_xor(top.value[i], mask);
    other.label = context.shuffle_xor(top.label, mask);
    other.rest = context.shuffle_xor(top.rest, mask);
    merge(top, other);
  }
  return top;
}

// A row of logits as log-probabilities of this stage: log p = (x − largest) − log_total.
template <class Scalar>
struct Row {
  const Scalar* logits;
  float largest;
  float log_total;
  bool valid;

  FC_FUNCTION float own(int c) const { return to_float(logits[c]) - largest - log_total; }
};

template <class Context, class Scalar>
FC_FUNCTION Row<Scalar> normalise(Context& context, const Scalar* logits, int classes) {
  float largest = -infinity(), total = 0.0f;
  int bad = 0;
  for (int c = context.lane(); c < classes; c += kWarp) {
    const float x = to_float(logits[c]);
    bad += !(fabsf(x) < infinity());
    const float greater = fmaxf(largest, x);
    total = total * exp_relative(largest, greater) + exp_relative(x, greater);
    largest = greater;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = context.shuffle_xor(largest, mask);
    const float other_total = context.shuffle_xor(total, mask);
    const float greater = fmaxf(largest, other);
    total = total * exp_relative(largest, greater) + other_total * exp_relative(other, greater);
    largest = greater;
  }
  return {logits, largest, logf(total), warp_sum(context, bad) == 0};
}

FC_FUNCTION float log_add_exp(float a, float b) {
  const float high = fmaxf(a, b), low = fminf(a, b);
  return high > -infinity() ? high + log1pf(expf(low - high)) : high;
}

FC_FUNCTION float log_odds(float lead, float others) {
  return fminf(fmaxf(lead - logf(others), -kLogOddsLimit), kLogOddsLimit);
}

// What one hidden unit adds to the score; `input` is its row of w1 times the standardised features.
FC_FUNCTION float through_unit(const ExitArguments& a, int unit, float input) {
  return a.w2[unit] * fmaxf(input + a.b1[unit], 0.0f);
}

// The selector on the four features of "stats" and "topk"; a lane takes every 32nd hidden unit.
template <class Context>
FC_FUNCTION float mlp_on_four(Context& context, const ExitArguments& a, const float* feature) {
  float score = 0.0f;
  for (int unit = context.lane(); unit < a.hidden; unit += kWarp) {
    float input = 0.0f;
    for (int f = 0; f < 4; f++) input += (feature[f] - a.mean[f]) / a.std[f] * a.w1[unit * 4 + f];
    score += through_unit(a, unit, input);
  }
  return warp_sum(context, score) + a.b2[0];
}

// The selector on all probabilities; a lane takes every 32nd class. `log_q` gives log q of a class.
template <class Context, class LogQ>
FC_FUNCTION float mlp_on_probs(Context& context, const ExitArguments& a, const LogQ& log_q) {
  float score = a.b2[0];
  for (int unit = 0; unit < a.hidden; unit++) {
    float input = 0.0f;
    for (int c = context.lane(); c < a.classes; c += kWarp)
      input += (expf(log_q(c)) - a.mean[c]) / a.std[c] * a.w1[unit * a.classes + c];
    score += through_unit(a, unit, warp_sum(context, input));
  }
  return score;
}

// One warp on one row; returns whether it stops. All lanes return the same.
template <class Context, class Scalar>
FC_FUNCTION bool exit_row(Context& context, const ExitArguments& a, const Scalar* logits, long long origin) {
  const Row<Scalar> row = normalise(context, logits, a.classes);
  const bool averaging = a.mean_of_stages != 0;
  float* const sums = a.log_sum + origin * a.classes;
  int visits = 0;
  if (averaging) visits = a.visits[origin] + row.valid;
  const float log_visits = logf(static_cast<float>(visits));
  const int previous = a.previous_label[origin];

  // log q of class c, from log Σ p of the valid stages so far.
  auto combined = [&](int c) { return averaging ? log_add_exp(sums[c], row.own(c)) - log_visits : row.own(c); };

  Top top = empty_top(), own_top = empty_top();
  float entropy = 0.0f;
  if (row.valid)
    for (int c = context.lane(); c < a.classes; c += kWarp) {
      const float q = combined(c);
      insert(top, q, c);
      if (averaging) insert(own_top, row.own(c), c);
      if (q > -infinity()) entropy -= expf(q) * q;
    }
  top = warp_top(context, top);
  const int own_label = averaging ? warp_top(context, own_top).label : top.label;
  entropy = warp_sum(context, entropy);

  bool stop = a.selector == kLast;
  if (!stop) {
    const float agreement = own_label == previous ? 1.0f : 0.0f;
    const float second = exp_relative(top.value[1], top.value[0]);
    const float third = exp_relative(top.value[2], top.value[0]);
    const float lead2 = top.value[1] - top.value[0], lead3 = top.value[2] - top.value[0];
    const float odds1 = log_odds(0.0f, second + third + top.rest);
    const float odds2 = log_odds(lead2, 1.0f + third + top.rest);
    float score;
    if (a.selector == kMaxProb) {
      score = odds1;
    } else if (a.selector == kMargin) {
      score = -lead2;
    } else if (a.selector == kEntropy) {
      score = -entropy;
    } else if (a.selector == kProbs) {
      score = mlp_on_probs(context, a, combined);  // not a number where the row is invalid, and not used then
    } else {
      const float odds3 = log_odds(lead3, 1.0f + second + top.rest);
      const bool topk = a.selector == kTopk;
      const float feature[4] = {odds1, odds2, topk ? odds3 : entropy, agreement};
      score = mlp_on_four(context, a, feature);
    }
    stop = row.valid && score >= a.threshold[0];
  }

  for (int c = context.lane(); c < a.classes; c += kWarp) {
    const float q = row.valid ? combined(c) : not_a_number();
    if (averaging && row.valid) sums[c] = log_add_exp(sums[c], row.own(c));
    if (stop) a.log_probs[origin * a.classes + c] = q;
  }
  if (context.lane() == 0) {
    a.previous_label[origin] = row.valid ? own_label : -1;
    if (averaging) a.visits[origin] = visits;
    if (stop) {
      a.label[origin] = row.valid ? top.label : -1;
      a.exit_stage[origin] = a.stage;
    }
  }
  return stop;
}

// A block takes kRows rows. `stays` is shared memory for their flags.
template <class Context, class Scalar>
FC_FUNCTION void exit_head(Context& context, const ExitArguments& a, const Scalar* logits, int* stays) {
  const int n = a.count[0];
  const int first = context.block() * kRows;
  for (int i = context.thread(); i < kRows; i += context.threads()) stays[i] = 0;
  context.sync();
  for (int i = context.warp(); i < kRows && first + i < n; i += context.warps()) {
    const long long row = first + i;
    const bool stop = exit_row(context, a, logits + row * a.classes, a.index[row]);
    if (context.lane() == 0) {
      stays[i] = !stop;
      a.keep[row] = !stop;
    }
  }
  context.sync();
  if (context.thread() == 0) {
    int kept = 0;
    for (int i = 0; i < kRows; i++) kept += stays[i];
    a.block_counts[context.block()] = kept;
  }
}

}  // namespace fastcascade
