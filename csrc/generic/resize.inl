// Upsampling, with the coordinates of torch.nn.functional.interpolate.

// The two source lines of output line i along an axis, and the weight of the second.
struct Neighbours {
  int64_t first, second;
  float weight;
};

static Neighbours source_lines(const Resize& c, int64_t i, int64_t in, int64_t out) {
  if (c.nearest) {
    const float scale = static_cast<float>(in) / static_cast<float>(out);  // torch's, also for double
    const int64_t line = std::min(static_cast<int64_t>(static_cast<float>(i) * scale), in - 1);
    return {line, line, 0.f};
  }
  const double at = c.align_corners
                        ? (out > 1 ? static_cast<double>(i * (in - 1)) / static_cast<double>(out - 1) : 0.0)
                        : (static_cast<double>(i) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5;
  const double clipped = std::max(at, 0.0);
  const int64_t first = std::min(static_cast<int64_t>(clipped), in - 1);
  return {first, std::min(first + 1, in - 1), static_cast<float>(clipped - static_cast<double>(first))};
}

// (1 − w) a + w b
FC_INLINE V interpolate(V a, V b, V one_minus_w, V w) { return fma(b, w, mul(a, one_minus_w)); }

static void resize_f32(const Resize& c, Range pixels) {
  const int64_t area = c.height * c.width;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const Neighbours rows = source_lines(c, p % area / c.width, c.in_height, c.height);
    const Neighbours columns = source_lines(c, p % c.width, c.in_width, c.width);
    const float* image = c.input + p / area * c.in_height * c.in_width * c.pitch;
    const auto pixel = [&](int64_t y, int64_t x) { return image + (y * c.in_width + x) * c.pitch; };
    const float *top = pixel(rows.first, columns.first), *top_right = pixel(rows.first, columns.second);
    const float *bottom = pixel(rows.second, columns.first), *bottom_right = pixel(rows.second, columns.second);
    float* y = c.output + p * c.pitch;
    if (c.nearest) {
      for (int64_t i = 0; i < c.pitch; i += kLanes) store(y + i, load(top + i));
      continue;
    }
    const V down = broadcast(rows.weight), up = broadcast(1.f - rows.weight);
    const V right = broadcast(columns.weight), left = broadcast(1.f - columns.weight);
    for (int64_t i = 0; i < c.pitch; i += kLanes)
      store(y + i, interpolate(interpolate(load(top + i), load(top_right + i), left, right),
                               interpolate(load(bottom + i), load(bottom_right + i), left, right), up, down));
  }
}
