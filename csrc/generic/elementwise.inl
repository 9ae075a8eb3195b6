// Pooling and elementwise operations, one block of channels at a time.

// A pooling window along one axis, clipped to the image, and the length that an average divides by.
struct Window {
  int64_t begin, end, length;
};

static Window pool_window(int64_t out, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t size,
                          bool include_padding) {
  const int64_t begin = out * stride - before, end = std::min(begin + kernel, size + after);
  const int64_t inside_begin = std::max<int64_t>(begin, 0), inside_end = std::min(end, size);
  return {inside_begin, inside_end, include_padding ? end - begin : inside_end - inside_begin};
}

static void pool_f32(const Pool& c, Range pixels) {
  const int64_t per_image = c.height * c.width;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const int64_t image = p / per_image, rest = p % per_image;
    const Window rows =
        pool_window(rest / c.width, c.kernel_h, c.stride_h, c.pad_top, c.pad_bottom, c.in_height, c.include_padding);
    const Window columns =
        pool_window(rest % c.width, c.kernel_w, c.stride_w, c.pad_left, c.pad_right, c.in_width, c.include_padding);
    const float* base = c.input + image * c.in_height * c.in_width * c.pitch;
    const V scale = broadcast(1.f / static_cast<float>(rows.length * columns.length));
    for (int64_t channel = 0; channel < c.pitch; channel += kLanes) {
      V sum = c.is_max ? broadcast(-std::numeric_limits<float>::infinity()) : zero();
      for (int64_t y = rows.begin; y < rows.end; ++y)
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          const V value = load(base + (y * c.in_width + x) * c.pitch + channel);
          sum = c.is_max ? maximum(sum, value) : add(sum, value);
        }
      store(c.output + p * c.pitch + channel, c.is_max ? sum : mul(sum, scale));
    }
  }
}

static void elementwise_f32(const Elementwise& c, Range pixels) {
  const V low = broadcast(c.activation.low), high = broadcast(c.activation.high);
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    for (int64_t channel = 0; channel < c.pitch; channel += kLanes) {
      const int64_t at = p * c.pitch + channel;
      V y = load(c.input + at);
      if (c.scale) y = fma(y, load(c.scale + channel), load(c.shift + channel));
      if (c.other) y = add(y, load(c.other + at));
      store(c.output + at, clamp(y, low, high));
    }
    const int64_t at = p * c.pitch;
    if (c.activation.is_function())
      apply_function(c.activation, c.output + at, c.output + at, c.pitch, 1, c.pitch / kLanes);
  }
}
