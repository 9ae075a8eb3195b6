// The int8 kernels, written once over the vector operations of isa/int8_*.cpp. F is a vector of floats, I of int32.

// ---- the epilogue ----

FC_INLINE F finish_sum(I sum, const Int8Epilogue& e, int64_t channel, int64_t offset) {
  const F product = mul(to_float(add(sum, load_i32(e.start + channel))), load(e.multiplier + channel));
  F y = add(exact(product), load(e.bias + channel));
  if (e.residual) {
    const F residual = sub(to_float(load_u8(e.residual + offset)), broadcast(e.residual_zero_point));
    y = add(y, exact(mul(residual, broadcast(e.residual_scale))));
  }
  return clamp(y, broadcast(e.low), broadcast(e.high));
}

// Stores a vector of outputs at `offset`, whose first channel is `channel`.
FC_INLINE void store_output(I sum, const Int8Epilogue& e, void* output, int64_t channel, int64_t offset) {
  const F y = finish_sum(sum, e, channel, offset);
  if (e.to_bytes)
    store_u8(static_cast<uint8_t*>(output) + offset, add(round_to_i32(y), broadcast_i32(e.zero_point)));
  else
    store(static_cast<float*>(output) + offset, y);
}

// ---- output pixels ----

struct PixelPlace {
  int64_t image, y, x;
};
FC_INLINE PixelPlace place_of(int64_t pixel, const ConvGeometry& g) {
  const int64_t row = pixel / g.width;
  return {row / g.height, row % g.height, pixel % g.width};
}
FC_INLINE void step_pixel(PixelPlace& p, const ConvGeometry& g) {
  if (++p.x < g.width) return;
  p.x = 0;
  if (++p.y < g.height) return;
  p.y = 0;
  ++p.image;
}

// ---- convolution ----

template <int R, int B>
struct Int8Sums {
  I v[R * B];
};

// One pointer serves three rows, as in gemm.inl.
template <int R>
struct TermRows {
  const Term* first[(R + 2) / 3];
  int64_t step;
};
template <int R, size_t... J>
FC_INLINE TermRows<R> term_rows(const Term* first, int64_t step, std::index_sequence<J...>) {
  return {{first + static_cast<int64_t>(3 * J) * step...}, step};
}

template <size_t... J>
FC_INLINE void load_weights(I (&w)[sizeof...(J)], const Term* p, std::index_sequence<J...>) {
  ((w[J] = load_terms(p + J * kLanes * kGroup)), ...);
}
template <int R, int B, size_t... J>
FC_INLINE void clear_sums(Int8Sums<R, B>& sums, std::index_sequence<J...>) {
  ((sums.v[J] = zero_i32()), ...);
}
template <int R, int B, size_t... J>
FC_INLINE void multiply_terms(Int8Sums<R, B>& sums, const TermRows<R>& rows, int64_t i, const I (&w)[B],
                              std::index_sequence<J...>) {
  ((sums.v[J] = dot(sums.v[J], broadcast_terms(rows.first[J / B / 3] + static_cast<int64_t>(J / B % 3) * rows.step + i),
                    w[J % B])),
   ...);
}
template <int R, int B, size_t... J>
FC_INLINE void store_outputs(const Int8Sums<R, B>& sums, const Int8Epilogue& e, void* output, int64_t channel,
                             int64_t offset, int64_t pitch, std::index_sequence<J...>) {
  (store_output(sums.v[J], e, output, channel + static_cast<int64_t>(J % B) * kLanes,
                offset + static_cast<int64_t>(J / B) * pitch + static_cast<int64_t>(J % B) * kLanes),
   ...);
}

// Σ_i terms[r][i] · weights[i][b] for R rows of `depth` terms and B blocks.
template <int R, int B>
FC_INLINE Int8Sums<R, B> sum_terms(const Term* terms, const Term* weights, int64_t depth) {
  constexpr std::make_index_sequence<R * B> each;
  const TermRows<R> rows = term_rows<R>(terms, depth, std::make_index_sequence<(R + 2) / 3>());
  Int8Sums<R, B> sums;
  clear_sums<R, B>(sums, each);
  for (int64_t i = 0; i < depth; i += kGroup, weights += B * kLanes * kGroup) {
    I w[B];
    load_weights(w, weights, std::make_index_sequence<B>());
    multiply_terms<R, B>(sums, rows, i, w, each);
  }
  return sums;
}

// R pixels × B blocks. `terms` are those of the first pixel, `offset` is its place in the output.
template <int R, int B>
FC_KERNEL void int8_tile(const Int8Conv& c, const Term* terms, const Term* weights, int64_t depth, int64_t channel,
                         int64_t offset) {
  const Int8Sums<R, B> sums = sum_terms<R, B>(terms, weights, depth);
  const Int8Epilogue e = c.epilogue;
  store_outputs<R, B>(sums, e, c.output, channel, offset, c.geometry.pitch, std::make_index_sequence<R * B>());
}

using Int8Tile = void (*)(const Int8Conv&, const Term*, const Term*, int64_t, int64_t, int64_t);

template <int B, size_t... R>
inline Int8Tile int8_tile_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr Int8Tile table[] = {int8_tile<R + 1, B>...};
  return table[rows - 1];
}

// One panel for a chunk of pixels.
template <int B>
static void multiply_int8_panel(const Int8Conv& c, const Term* terms, Range pixels, int64_t block) {
  const int64_t depth = c.depth(), channel = block * kLanes;
  const Term* weights = static_cast<const Term*>(c.weights) + channel * depth;
  for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += kRows) {
    const int64_t left = pixels.end - pixel, rows = left < kRows ? left : kRows;
    int8_tile_of<B>(rows, std::make_index_sequence<kRows>())(c, terms + (pixel - pixels.begin) * depth, weights, depth,
                                                             channel, pixel * c.geometry.pitch + channel);
  }
}

static void fill_terms(Term* to, int64_t count, uint8_t value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// The terms of a row of the kernel at one output pixel.
FC_INLINE void gather_kernel_row(const Int8Conv& c, const uint8_t* row, int64_t left, Term* to) {
  const ConvGeometry& g = c.geometry;
  const bool whole_pixels = c.tap_terms == g.in_pitch && g.dilation_w == 1;
  if (whole_pixels && left >= 0 && left + g.kernel_w <= g.in_width)
    return copy_terms(row + left * g.in_pitch, g.kernel_w * c.tap_terms, to);
  for (int64_t kx = 0; kx < g.kernel_w; ++kx, to += c.tap_terms) {
    const int64_t x = left + kx * g.dilation_w;
    if (x >= 0 && x < g.in_width)
      copy_terms(row + x * g.in_pitch, c.tap_terms, to);
    else
      fill_terms(to, c.tap_terms, c.zero_point);
  }
}

// The terms of output pixels [pixels] in one group of channels, pixel by pixel.
static void gather_terms(const Int8Conv& c, Range pixels, int64_t group, Term* to) {
  const ConvGeometry& g = c.geometry;
  const uint8_t* input = c.input + group * c.group_channels;
  const int64_t row_terms = g.kernel_w * c.tap_terms;
  PixelPlace at = place_of(pixels.begin, g);
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel, step_pixel(at, g))
    for (int64_t ky = 0; ky < g.kernel_h; ++ky, to += row_terms) {
      const int64_t y = at.y * g.stride_h - g.pad_top + ky * g.dilation_h;
      if (y >= 0 && y < g.in_height)
        gather_kernel_row(c, input + (at.image * g.in_height + y) * g.in_width * g.in_pitch,
                          at.x * g.stride_w - g.pad_left, to);
      else
        fill_terms(to, row_terms, c.zero_point);
    }
}

static void conv_int8(const Int8Conv& c, Range pixels, Range panels) {
  const int64_t per_group = int8_panels(c.blocks_per_group), chunk = int8_chunk_pixels(c, kRows);
  Term* const terms = static_cast<Term*>(c.scratch);
  for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += chunk) {
    const Range part{pixel, pixel + chunk < pixels.end ? pixel + chunk : pixels.end};
    int64_t gathered = -1;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t group = panel / per_group, first = panel % per_group * kInt8PanelBlocks;
      if (group != gathered) gather_terms(c, part, group, terms);
      gathered = group;
      const int64_t block = group * c.blocks_per_group + first;
      if (c.blocks_per_group - first >= kInt8PanelBlocks)
        multiply_int8_panel<kInt8PanelBlocks>(c, terms, part, block);
      else
        multiply_int8_panel<1>(c, terms, part, block);
    }
  }
}

// ---- depthwise convolution ----

// The input pixels under the taps of `count` output pixels, [tap][kDepthwisePixels]; padding outside the image.
static void find_taps(const Int8Depthwise& c, int64_t first, int64_t count) {
  const ConvGeometry& g = c.geometry;
  PixelPlace at = place_of(first, g);
  for (int64_t i = 0; i < count; ++i, step_pixel(at, g)) {
    const uint8_t** tap = c.scratch + i;
    for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
      const int64_t y = at.y * g.stride_h - g.pad_top + ky * g.dilation_h;
      for (int64_t kx = 0; kx < g.kernel_w; ++kx, tap += kDepthwisePixels) {
        const int64_t x = at.x * g.stride_w - g.pad_left + kx * g.dilation_w;
        const bool inside = y >= 0 && y < g.in_height && x >= 0 && x < g.in_width;
        *tap = inside ? c.input + ((at.image * g.in_height + y) * g.in_width + x) * g.in_pitch : c.padding;
      }
    }
  }
}

template <int R>
FC_KERNEL void int8_depthwise_pixels(const Int8Depthwise& c, int64_t first) {
  const ConvGeometry& g = c.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w, pitch = g.pitch;
  const Int8Epilogue e = c.epilogue;
  const int32_t* weights = c.weights;
  for (int64_t channel = 0; channel < pitch; channel += kLanes) {
    I sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zero_i32();
    for (int64_t tap = 0; tap < taps; ++tap, weights += kLanes) {
      const I w = load_i32(weights);
      for (int r = 0; r < R; ++r)
        sums[r] = dot_bytes(sums[r], load_u8(c.scratch[tap * kDepthwisePixels + r] + channel), w);
    }
    for (int r = 0; r < R; ++r) store_output(sums[r], e, c.output, channel, (first + r) * pitch + channel);
  }
}

static void depthwise_int8(const Int8Depthwise& c, Range pixels) {
  int64_t pixel = pixels.begin;
  for (; pixel + kDepthwisePixels <= pixels.end; pixel += kDepthwisePixels) {
    find_taps(c, pixel, kDepthwisePixels);
    int8_depthwise_pixels<kDepthwisePixels>(c, pixel);
  }
  for (; pixel < pixels.end; ++pixel) {
    find_taps(c, pixel, 1);
    int8_depthwise_pixels<1>(c, pixel);
  }
}

// ---- pooling, bytes from and to float32 ----

FC_INLINE Range window_of(const PoolAxis& axis, int64_t i) {
  const int64_t begin = i * axis.stride - axis.pad_before, end = begin + axis.kernel;
  return {begin < 0 ? 0 : begin, end > axis.in ? axis.in : end};
}

static void pool_max_u8(const Int8Pool& c, Range pixels) {
  const int64_t area = c.rows.count * c.columns.count;
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
    const Range ys = window_of(c.rows, pixel % area / c.columns.count),
                xs = window_of(c.columns, pixel % c.columns.count);
    const uint8_t* image = c.input + pixel / area * c.rows.in * c.columns.in * c.pitch;
    uint8_t* __restrict to = c.output + pixel * c.pitch;
    for (int64_t i = 0; i < c.pitch; ++i) to[i] = 0;
    for (int64_t y = ys.begin; y < ys.end; ++y)
      for (int64_t x = xs.begin; x < xs.end; ++x) {
        const uint8_t* __restrict from = image + (y * c.columns.in + x) * c.pitch;
        for (int64_t i = 0; i < c.pitch; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
      }
  }
}

static void quantize_f32(const ByteGrid& c, const float* x, uint8_t* y, int32_t* invalid, Range pixels) {
  const F inverse = broadcast(1.f / c.scale), low = broadcast(static_cast<float>(-c.zero_point)),
          high = broadcast(static_cast<float>(255 - c.zero_point));
  const I zero_point = broadcast_i32(c.zero_point);
  while (pixels.begin < pixels.end) {
    const int64_t instance = pixels.begin / c.area, next = (instance + 1) * c.area;
    const int64_t begin = pixels.begin * c.pitch, end = (next < pixels.end ? next : pixels.end) * c.pitch;
    F nothing = broadcast(0.f);  // stays 0 while all values are finite
    for (int64_t i = begin; i < end; i += kLanes) {
      const F v = load(x + i);
      nothing = add(nothing, mul(v, broadcast(0.f)));
      store_u8(y + i, add(round_to_i32(clamp(mul(v, inverse), low, high)), zero_point));
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

using WinogradInt8 = void (*)(const Int8Conv&, Range tiles, Range panels);

static constexpr Int8Kernels make_int8_kernels(const char* isa, WinogradInt8 winograd) {
  return {isa,         kLanes,       kGroup,       static_cast<int>(sizeof(Term)),
          kRows,       conv_int8,    winograd,     depthwise_int8,
          pool_max_u8, quantize_f32, dequantize_u8};
}
