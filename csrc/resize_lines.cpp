#include "resize_lines.h"

#include <algorithm>
#include <cmath>

namespace fastcascade {
namespace {

std::vector<WeightedLine> nearest_lines(int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);  // torch's, also for double
  std::vector<WeightedLine> lines;
  for (int64_t i = 0; i < out; ++i)
    lines.push_back({std::min(static_cast<int64_t>(static_cast<float>(i) * scale), in - 1), 1.f});
  return lines;
}

std::vector<WeightedLine> bilinear_lines(int64_t in, int64_t out, bool align_corners) {
  std::vector<WeightedLine> lines;
  for (int64_t i = 0; i < out; ++i) {
    const double at = align_corners
                          ? (out > 1 ? static_cast<double>(i * (in - 1)) / static_cast<double>(out - 1) : 0.0)
                          : (static_cast<double>(i) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5;
    const double clipped = std::max(at, 0.0);
    const int64_t first = std::min(static_cast<int64_t>(clipped), in - 1);
    const float weight = static_cast<float>(clipped - static_cast<double>(first));
    lines.push_back({first, 1.f - weight});
    lines.push_back({std::min(first + 1, in - 1), weight});
  }
  return lines;
}

// Half of the support of a filter on the scale of the source, without antialiasing.
double radius(Interpolation kind) { return kind == Interpolation::bicubic ? 2.0 : 1.0; }

// The triangle, or Keys's cubic with a = -1/2 (Keys 1981), as Pillow and torch have them.
double filter(Interpolation kind, double x) {
  x = std::abs(x);
  if (kind == Interpolation::bilinear) return std::max(1.0 - x, 0.0);
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
  if (x < 2.0) return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
  return 0.0;
}

// The filter is as wide as an output line is on the source, if that is larger than a source line.
std::vector<WeightedLine> antialiased_lines(Interpolation kind, int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out), width = std::max(scale, 1.0);
  const double support = radius(kind) * width;
  std::vector<int64_t> begins;
  std::vector<std::vector<double>> weights;
  size_t taps = 0;
  for (int64_t i = 0; i < out; ++i) {
    const double centre = scale * (static_cast<double>(i) + 0.5);
    const int64_t begin = std::max(static_cast<int64_t>(centre - support + 0.5), int64_t{0});
    const int64_t end = std::min(static_cast<int64_t>(centre + support + 0.5), in);
    std::vector<double> window;
    double total = 0.0;
    for (int64_t line = begin; line < end; ++line) {
      window.push_back(filter(kind, (static_cast<double>(line) + 0.5 - centre) / width));
      total += window.back();
    }
    for (double& weight : window) weight /= total;
    taps = std::max(taps, window.size());
    begins.push_back(begin);
    weights.push_back(std::move(window));
  }
  std::vector<WeightedLine> lines;
  for (size_t i = 0; i < weights.size(); ++i)
    for (size_t t = 0; t < taps; ++t) {
      // Shorter windows repeat their last line with weight 0, so that no other line's NaN enters.
      const size_t last = weights[i].size() - 1;
      lines.push_back(
          {begins[i] + static_cast<int64_t>(std::min(t, last)), t > last ? 0.f : static_cast<float>(weights[i][t])});
    }
  return lines;
}

}  // namespace

std::vector<WeightedLine> resize_lines(const OpSpec& op, int64_t in, int64_t out) {
  if (op.antialias) return antialiased_lines(op.interpolation, in, out);
  if (op.interpolation == Interpolation::nearest) return nearest_lines(in, out);
  return bilinear_lines(in, out, op.align_corners);
}

}  // namespace fastcascade
