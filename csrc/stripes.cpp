#include "stripes.h"

#include <algorithm>

namespace fastcascade {
namespace {

constexpr int64_t kKeptBytes = 256 << 10;       // values up to this size stay in the second-level cache
constexpr int64_t kStripeBytes = 160 << 10;     // of the values that a chain exchanges
constexpr int64_t kMaxWeightBytes = 256 << 10;  // of a chain: every stripe reads them
constexpr int64_t kMinStripePixels = 48;

bool is_convolution(const Step& step) {
  return step.kind == StepKind::direct || step.kind == StepKind::depthwise ||
         (step.kind == StepKind::winograd && !step.winograd.pools);
}

int64_t bytes(const Buffer& weights) { return weights.size() * static_cast<int64_t>(sizeof(float)); }

class ChainLinker {
 public:
  explicit ChainLinker(Network& net) : net_(net), reads_(net.values.size()) {
    for (const Step& step : net.steps)
      for (int64_t v : step.reads()) ++reads_[v];
    for (int64_t v : {net.logits, net.features})
      if (v >= 0) ++reads_[v];
  }

  std::vector<Unit> link() {
    std::vector<Unit> units;
    for (size_t i = 0; i < net_.steps.size();) {
      size_t end = i + 1;
      int64_t weights = bytes(net_.steps[i].weights);
      while (end < net_.steps.size() && end - i < kMaxChain && can_link(end)) {
        weights += bytes(net_.steps[end].weights);
        if (weights > kMaxWeightBytes) break;
        ++end;
      }
      units.push_back({i, end});
      if (end - i > 1) units.back().stripe_rows = stripe_rows(i, end);
      for (size_t k = i; k + 1 < end; ++k) net_.values[net_.steps[k].output].is_private = true;
      i = end;
    }
    return units;
  }

 private:
  Network& net_;
  std::vector<int> reads_;

  // True where step i can join the chain of the step before.
  bool can_link(size_t i) const {
    const Step &step = net_.steps[i], &before = net_.steps[i - 1];
    const Value& value = net_.values[before.output];
    return is_convolution(step) && is_convolution(before) && step.inputs[0] == before.output &&
           reads_[before.output] == 1 && value.floats * static_cast<int64_t>(sizeof(float)) > kKeptBytes;
  }

  // As many rows as kStripeBytes hold of what the steps exchange.
  int64_t stripe_rows(size_t begin, size_t end) const {
    const Shape& last = net_.shape(net_.steps[end - 1].output);
    int64_t exchanged = 0;
    for (size_t k = begin; k + 1 < end; ++k) exchanged += net_.values[net_.steps[k].output].floats;
    const int64_t row_bytes = exchanged * static_cast<int64_t>(sizeof(float)) / last.h;
    const int64_t rows = std::max({kStripeBytes / row_bytes, kMinStripePixels / last.w, int64_t{1}});
    const int64_t per_line = net_.steps[end - 1].row_window.rows_per_line;
    return (rows + per_line - 1) / per_line * per_line;
  }
};

// Output rows as whole lines of the step.
Range whole_lines(const Step& step, int64_t height, Range rows) {
  const int64_t per_line = step.row_window.rows_per_line;
  return {rows.begin / per_line * per_line, std::min(height, (rows.end + per_line - 1) / per_line * per_line)};
}

// The input rows under some output rows.
Range rows_under(const RowWindow& w, int64_t in_height, Range rows) {
  const int64_t first = rows.begin * w.stride - w.pad;
  const int64_t last = (rows.end - 1) * w.stride - w.pad + (w.kernel - 1) * w.dilation;
  return {std::clamp<int64_t>(first, 0, in_height), std::clamp<int64_t>(last + 1, 0, in_height)};
}

// The part of a step that computes some output rows of an instance.
StepPart part_of_rows(const Step& step, int64_t height, int64_t instance, Range rows) {
  const int64_t per_line = step.row_window.rows_per_line, lines = (height + per_line - 1) / per_line;
  const int64_t line_items = step.work_items / lines, above = instance * step.work_items;
  const int64_t begin = rows.begin / per_line, end = (rows.end + per_line - 1) / per_line;
  return {{above + begin * line_items, above + end * line_items}, {0, step.panels}};
}

}  // namespace

std::vector<Unit> link_chains(Network& net) { return ChainLinker(net).link(); }

void run_stripes(const Network& net, const Unit& chain, Range rows, StripeRows& have,
                 const std::function<void(size_t, StepPart)>& run) {
  const size_t last = chain.end - chain.begin - 1;
  const auto step = [&](size_t k) -> const Step& { return net.steps[chain.begin + k]; };
  const auto height = [&](size_t k) { return net.shape(step(k).output).h; };
  for (int64_t row = rows.begin, end; row < rows.end; have.next = row = end) {
    const int64_t instance = row / height(last), above = instance * height(last);
    end = std::min({row + chain.stripe_rows, rows.end, above + height(last)});
    Range need[kMaxChain];
    need[last] = {row - above, end - above};
    for (size_t k = last; k > 0; --k)
      need[k - 1] = whole_lines(step(k - 1), height(k - 1), rows_under(step(k).row_window, height(k - 1), need[k]));
    const bool continues = row == have.next && row > above;
    for (size_t k = 0; k <= last; ++k) {
      Range missing = need[k];
      if (continues) missing.begin = std::max(missing.begin, have.end[k]);
      have.end[k] = std::max(missing.begin, missing.end);
      if (missing.begin < missing.end) run(chain.begin + k, part_of_rows(step(k), height(k), instance, missing));
    }
  }
}

}  // namespace fastcascade
