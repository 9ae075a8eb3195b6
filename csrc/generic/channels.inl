// Operations over the channels of each pixel. Padded channels never count, and become 0.

// Σ term(channel) over the channels, `term` for vectors and `tail` for the channels that fill none.
template <class Term, class Tail>
FC_INLINE float sum_channels(int64_t channels, Term term, Tail tail) {
  V even = zero(), odd = zero();
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    even = add(even, term(c));
    odd = add(odd, term(c + kLanes));
  }
  if (c + kLanes <= channels) {
    even = add(even, term(c));
    c += kLanes;
  }
  float lanes[kLanes];
  store(lanes, add(even, odd));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  float rest = 0.f;
  for (; c < channels; ++c) rest += tail(c);
  return lanes[0] + rest;
}

FC_INLINE float channel_sum(const float* x, int64_t channels) {
  return sum_channels(channels, [=](int64_t c) { return load(x + c); }, [=](int64_t c) { return x[c]; });
}

// The larger number; NaN if either is.
FC_INLINE float maximum_of(float a, float b) { return !(a == a) || a > b ? a : b; }

FC_INLINE float channel_maximum(const float* x, int64_t channels) {
  V top = broadcast(x[0]);
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) top = maximum(top, load(x + c));
  float lanes[kLanes];
  store(lanes, top);
  float result = lanes[0];
  for (float lane : lanes) result = maximum_of(result, lane);
  for (; c < channels; ++c) result = maximum_of(result, x[c]);
  return result;
}

static void channel_reduce_f32(const ChannelOp& c, Range pixels) {
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const float* x = c.input + p * c.in_pitch;
    float* y = c.output + p * c.pitch;
    y[0] = c.is_max ? channel_maximum(x, c.channels) : channel_sum(x, c.channels) / static_cast<float>(c.channels);
    clear_padding(y, 1, c.pitch, 1);
  }
}

static void layer_norm_f32(const ChannelOp& c, Range pixels) {
  const float count = static_cast<float>(c.channels);
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const float* x = c.input + p * c.in_pitch;
    float* y = c.output + p * c.pitch;
    const float mean = channel_sum(x, c.channels) / count;
    const V center = broadcast(mean);
    const auto square = [=](int64_t i) {
      const V d = sub(load(x + i), center);
      return mul(d, d);
    };
    const auto tail = [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); };
    const float variance = sum_channels(c.channels, square, tail) / count;
    const V factor = broadcast(1.f / __builtin_sqrtf(variance + c.eps));
    for (int64_t i = 0; i < c.pitch; i += kLanes)
      store(y + i, fma(mul(sub(load(x + i), center), factor), load(c.scale + i), load(c.shift + i)));
    clear_padding(y, c.channels, c.pitch, 1);
  }
}

// Softmax over all channels.
FC_KERNEL void softmax_pixel(const float* x, float* y, int64_t channels) {
  const V top = broadcast(channel_maximum(x, channels));
  for (int64_t i = 0; i < channels; i += kLanes) store(y + i, exp_flushed(sub(load(x + i), top)));
  const V factor = broadcast(1.f / channel_sum(y, channels));
  for (int64_t i = 0; i < channels; i += kLanes) store(y + i, mul(load(y + i), factor));
}

// Lanes of one vector compete with those at i · step, i < parts. `count` lanes are stored.
FC_KERNEL void softmax_lanes(const float* x, float* y, int64_t parts, int64_t step, int64_t count) {
  V top = load(x);
  for (int64_t i = 1; i < parts; ++i) top = maximum(top, load(x + i * step));
  V sum = zero();
  for (int64_t i = 0; i < parts; ++i) sum = add(sum, exp_flushed(sub(load(x + i * step), top)));
  const V factor = div(broadcast(1.f), sum);
  for (int64_t i = 0; i < parts; ++i) {
    float lanes[kLanes];
    store(lanes, mul(exp_flushed(sub(load(x + i * step), top)), factor));
    for (int64_t lane = 0; lane < count; ++lane) y[i * step + lane] = lanes[lane];
  }
}

static void softmax_f32(const ChannelOp& c, Range pixels) {
  const int64_t step = c.channels / c.parts;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const float* x = c.input + p * c.in_pitch;
    float* y = c.output + p * c.pitch;
    if (step == 1)
      softmax_pixel(x, y, c.channels);
    else
      for (int64_t i = 0; i < step; i += kLanes)
        softmax_lanes(x + i, y + i, c.parts, step, std::min<int64_t>(kLanes, step - i));
    clear_padding(y, c.channels, c.pitch, 1);
  }
}
