// The int8 kernels besides convolution as a matrix product, and their table.

// ---- depthwise convolution ----

constexpr int64_t kDepthwisePixels = 4;  // of a row, that are computed together

// The input pixels under the taps of an output pixel; padding outside the image.
static void find_taps(const Int8Depthwise& c, int64_t pixel) {
  const ConvGeometry& g = c.geometry;
  const PixelPlace at = place_of(pixel, g);
  const uint8_t** tap = c.scratch;
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    const int64_t y = at.y * g.stride_h - g.pad_top + ky * g.dilation_h;
    for (int64_t kx = 0; kx < g.kernel_w; ++kx, ++tap) {
      const int64_t x = at.x * g.stride_w - g.pad_left + kx * g.dilation_w;
      const bool inside = y >= 0 && y < g.in_height && x >= 0 && x < g.in_width;
      *tap = inside ? c.input + ((at.image * g.in_height + y) * g.in_width + x) * g.in_pitch : c.padding;
    }
  }
}

FC_KERNEL void depthwise_pixel(const Int8Depthwise& c, int64_t pixel) {
  const ConvGeometry& g = c.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const Int8Epilogue e = c.epilogue;
  const int32_t* weights = c.weights;
  for (int64_t channel = 0; channel < g.pitch; channel += kLanes) {
    I sum = load_i32(e.start + channel);
    for (int64_t tap = 0; tap < taps; ++tap, weights += kLanes)
      sum = dot_bytes(sum, load_u8(c.scratch[tap] + channel), load_i32(weights));
    store_output(sum, e, c.output, channel, pixel * g.pitch + channel);
  }
}

// R neighbouring pixels of a row, one block of channels. `rows` are those under the kernel, `left` is the offset in
// them of the first pixel's first tap.
template <int R>
FC_INLINE void int8_depthwise_block(const Int8Depthwise& c, const uint8_t* const* rows, int64_t left, int64_t channel,
                                    int64_t pixel) {
  const ConvGeometry& g = c.geometry;
  const int64_t tap_step = g.dilation_w * g.in_pitch, pixel_step = g.stride_w * g.in_pitch;
  const int32_t* weights = c.weights + channel * g.kernel_h * g.kernel_w;
  const I start = load_i32(c.epilogue.start + channel);
  I sums[R];
  for (int r = 0; r < R; ++r) sums[r] = start;
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    const uint8_t* at = rows[ky] + left + channel;
    for (int64_t kx = 0; kx < g.kernel_w; ++kx, at += tap_step, weights += kLanes) {
      const I w = load_i32(weights);
      for (int r = 0; r < R; ++r) sums[r] = dot_bytes(sums[r], load_u8(at + r * pixel_step), w);
    }
  }
  const Int8Epilogue e = c.epilogue;
  for (int r = 0; r < R; ++r) store_output(sums[r], e, c.output, channel, (pixel + r) * g.pitch + channel);
}

// Pixels of a row whose taps lie in its columns. A block of channels goes along all of them, so that its weights stay
// in the first-level cache.
FC_KERNEL void depthwise_inside(const Int8Depthwise& c, const uint8_t* const* rows, int64_t x, int64_t pixel,
                                int64_t count) {
  const ConvGeometry& g = c.geometry;
  const int64_t left = (x * g.stride_w - g.pad_left) * g.in_pitch, step = g.stride_w * g.in_pitch;
  for (int64_t channel = 0; channel < g.pitch; channel += kLanes) {
    int64_t i = 0;
    for (; i + kDepthwisePixels <= count; i += kDepthwisePixels)
      int8_depthwise_block<kDepthwisePixels>(c, rows, left + i * step, channel, pixel + i);
    for (; i < count; ++i) int8_depthwise_block<1>(c, rows, left + i * step, channel, pixel + i);
  }
}

FC_INLINE void depthwise_border(const Int8Depthwise& c, int64_t pixel, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    find_taps(c, pixel + i);
    depthwise_pixel(c, pixel + i);
  }
}

// Some pixels of one output row, from `at`.
static void depthwise_row(const Int8Depthwise& c, const PixelPlace& at, int64_t pixel, int64_t count) {
  const ConvGeometry& g = c.geometry;
  const uint8_t** rows = c.scratch;
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    const int64_t y = at.y * g.stride_h - g.pad_top + ky * g.dilation_h;
    const bool inside = y >= 0 && y < g.in_height;
    rows[ky] = inside ? c.input + (at.image * g.in_height + y) * g.in_width * g.in_pitch : c.padding;
  }
  const int64_t reach = (g.kernel_w - 1) * g.dilation_w, room = g.in_width - 1 - reach + g.pad_left;
  const int64_t first = (g.pad_left + g.stride_w - 1) / g.stride_w;  // columns [first, last) have all taps inside
  const int64_t last = room < 0 ? 0 : room / g.stride_w + 1;
  const Range columns{std::max(at.x, first), std::min(at.x + count, last)};
  if (columns.begin >= columns.end) return depthwise_border(c, pixel, count);
  depthwise_inside(c, rows, columns.begin, pixel + columns.begin - at.x, columns.end - columns.begin);
  depthwise_border(c, pixel, columns.begin - at.x);
  depthwise_border(c, pixel + columns.end - at.x, at.x + count - columns.end);
}

static void depthwise_int8(const Int8Depthwise& c, Range pixels) {
  const int64_t width = c.geometry.width;
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const PixelPlace at = place_of(pixel, c.geometry);
    const int64_t count = std::min(width - at.x, pixels.end - pixel);
    depthwise_row(c, at, pixel, count);
    pixel += count;
  }
}

// ---- pooling, bytes from and to float32 ----

FC_INLINE Range window_of(const PoolAxis& axis, int64_t i) {
  const int64_t begin = i * axis.stride - axis.pad_before, end = begin + axis.kernel;
  return {begin < 0 ? 0 : begin, end > axis.in ? axis.in : end};
}

template <int W>
FC_INLINE void max_bytes(const Int8Pool& c, const uint8_t* image, Range ys, Range xs, uint8_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  for (int64_t i = 0; i < c.pitch; i += W) {
    Bytes most = {};
    for (int64_t y = ys.begin; y < ys.end; ++y)
      for (int64_t x = xs.begin; x < xs.end; ++x) {
        Bytes v;
        std::memcpy(&v, image + (y * c.columns.in + x) * c.pitch + i, W);
        most = most > v ? most : v;
      }
    std::memcpy(to + i, &most, W);
  }
}

// W bytes at a time, which divide the pitch.
template <int W>
FC_KERNEL void pool_max_bytes(const Int8Pool& c, Range pixels) {
  const int64_t area = c.rows.count * c.columns.count;
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
    const Range ys = window_of(c.rows, pixel % area / c.columns.count),
                xs = window_of(c.columns, pixel % c.columns.count);
    max_bytes<W>(c, c.input + pixel / area * c.rows.in * c.columns.in * c.pitch, ys, xs, c.output + pixel * c.pitch);
  }
}

static void pool_max_u8(const Int8Pool& c, Range pixels) {
  constexpr int kWidest = 4 * kLanes;
  (c.pitch % kWidest ? pool_max_bytes<kLanes> : pool_max_bytes<kWidest>)(c, pixels);
}

static void quantize_f32(const ByteGrid& c, const float* x, uint8_t* y, int32_t* invalid, Range pixels) {
  const F inverse = broadcast(1.f / c.scale), low = broadcast(static_cast<float>(-c.zero_point)),
          high = broadcast(static_cast<float>(255 - c.zero_point));
  const I zero_point = broadcast_i32(c.zero_point);
  while (pixels.begin < pixels.end) {
    const int64_t instance = pixels.begin / c.area, next = (instance + 1) * c.area;
    const int64_t begin = pixels.begin * c.pitch, end = (next < pixels.end ? next : pixels.end) * c.pitch;
    F nothing = broadcast(0.f);  // stays 0 while all values are finite
    const auto quantize = [&](const float* from, uint8_t* to) {
      const F v = load(from);
      nothing = add(nothing, mul(v, broadcast(0.f)));
      store_u8(to, add(round_to_i32(clamp(mul(v, inverse), low, high)), zero_point));
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) quantize(x + i, y + i);
    if (i < end) {  // what follows may belong to another instance
      float rest[kLanes] = {};
      uint8_t bytes[kLanes];
      for (int64_t k = i; k < end; ++k) rest[k - i] = x[k];
      quantize(rest, bytes);
      for (int64_t k = i; k < end; ++k) y[k] = bytes[k - i];
    }
    float parts[kLanes];
    store(parts, nothing);
    for (const float part : parts)
      if (!(part == 0.f)) __atomic_store_n(invalid + instance, 1, __ATOMIC_RELAXED);
    pixels.begin = next;
  }
}

static void dequantize_u8(const ByteGrid& c, const uint8_t* x, float* y, Range pixels) {
  const F scale = broadcast(c.scale), zero_point = broadcast(static_cast<float>(c.zero_point));
  for (int64_t i = pixels.begin * c.pitch; i < pixels.end * c.pitch; i += kLanes)
    store(y + i, mul(sub(to_float(load_u8(x + i)), zero_point), scale));
}

using ConvInt8 = void (*)(const Int8Conv&, Range items, Range panels);

static constexpr Int8Kernels make_int8_kernels(const char* isa, ConvInt8 conv, ConvInt8 winograd) {
  return {isa,          kLanes,       kGroup,         static_cast<int>(sizeof(Term)),
          kRows,        kLeastRows,   kRunUnit,       kChunkTerms,
          conv,         winograd,     depthwise_int8, pool_max_u8,
          quantize_f32, dequantize_u8};
}
