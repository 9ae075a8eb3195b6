// Operations on corresponding elements of values that may broadcast, then an activation.

template <Combine C>
FC_INLINE V combine(V a, V b, const float* shift) {
  if constexpr (C == Combine::add) return add(a, b);
  if constexpr (C == Combine::multiply) return mul(a, b);
  if constexpr (C == Combine::scale_shift) return fma(a, b, load(shift));
  return a;
}

template <bool OneChannel>
FC_INLINE V load_operand(const float* p, int64_t channel) {
  if constexpr (OneChannel)
    return broadcast(*p);
  else
    return load(p + channel);
}

// Where a run of pixels in one row is read and written. Operands advance by their own pixel steps, 0 where they
// broadcast; `shift` advances as b.
struct PixelRun {
  const float *a, *b, *shift;
  float* y;
  int64_t count;
};

template <Combine C, bool OneA, bool OneB>
FC_KERNEL void combine_run(const Elementwise& c, const PixelRun& run) {
  const V low = broadcast(c.activation.low), high = broadcast(c.activation.high);
  for (int64_t i = 0; i < run.count; ++i) {
    const float *a = run.a + i * c.a.pixel_step, *b = run.b + i * c.b.pixel_step;
    const float* shift = run.shift + i * c.b.pixel_step;
    for (int64_t channel = 0; channel < c.pitch; channel += kLanes) {
      const V y = combine<C>(load_operand<OneA>(a, channel), load_operand<OneB>(b, channel), shift + channel);
      store(run.y + i * c.pitch + channel, clamp(y, low, high));
    }
  }
}

using CombineRun = void (*)(const Elementwise&, const PixelRun&);

template <Combine C>
inline CombineRun combine_run_of(bool one_a, bool one_b) {
  if (one_a) return one_b ? combine_run<C, true, true> : combine_run<C, true, false>;
  return one_b ? combine_run<C, false, true> : combine_run<C, false, false>;
}

inline CombineRun combine_run_of(const Elementwise& c) {
  switch (c.combine) {
    case Combine::add: return combine_run_of<Combine::add>(c.a.one_channel, c.b.one_channel);
    case Combine::multiply: return combine_run_of<Combine::multiply>(c.a.one_channel, c.b.one_channel);
    case Combine::scale_shift: return combine_run<Combine::scale_shift, false, false>;
    case Combine::none: break;
  }
  return combine_run<Combine::none, false, false>;
}

// Functions and products can leave the finite numbers, so padded channels become 0.
FC_INLINE void clear_padding(float* y, int64_t channels, int64_t pitch, int64_t pixels) {
  if (channels == pitch) return;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = channels; c < pitch; ++c) y[i * pitch + c] = 0.f;
}

// Floats of output between two passes over it, so that they stay in L1.
constexpr int64_t kRunFloats = 4096;

static void elementwise_f32(const Elementwise& c, Range pixels) {
  const CombineRun combine_pixels = combine_run_of(c);
  const bool lone_function = c.combine == Combine::none && c.activation.is_function();
  const int64_t area = c.height * c.width, limit = std::max<int64_t>(1, kRunFloats / c.pitch);
  PixelRun run;
  for (int64_t p = pixels.begin; p < pixels.end; p += run.count) {
    const int64_t image = p / area, y = p % area / c.width, x = p % c.width;
    const auto offset = [&](const Operand& o) { return image * o.image_step + y * o.row_step + x * o.pixel_step; };
    const int64_t count = std::min({pixels.end - p, c.width - x, limit});
    run = {c.a.data + offset(c.a), c.b.data + offset(c.b), c.shift + offset(c.b), c.output + p * c.pitch, count};
    if (!lone_function) combine_pixels(c, run);
    if (c.activation.is_function())
      apply_function(c.activation, lone_function ? run.a : run.y, run.y, c.pitch, count, c.pitch / kLanes);
    clear_padding(run.y, c.channels, c.pitch, count);
  }
}
