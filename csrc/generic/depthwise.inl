// Depthwise convolution: every channel has a kernel of its own. A tile is a few adjacent output pixels of a row and one
// vector of channels. Its sums and one row of the kernel stay in registers, and each input under them is loaded once.

constexpr int kDepthwiseColumns = 7;  // divides the widths of the maps of 224×224 images: 112, 56, 28, 14 and 7

struct DepthwiseTile {
  V sums[kDepthwiseColumns];
};

// Adds the input pixel in column J under the tile to output C, if the kernel's row covers it there.
template <int KW, int S, int J, size_t C>
FC_INLINE void add_tap(DepthwiseTile& tile, const V (&taps)[KW], V x) {
  constexpr int kx = J - static_cast<int>(C) * S;
  if constexpr (kx >= 0 && kx < KW) tile.sums[C] = fma(x, taps[kx], tile.sums[C]);
}

alignas(64) static const float kDepthwiseZeros[kLanes] = {};

// Column J under the tile. Those outside the image, on the edges only, are zero.
template <int KW, int S, bool Edge, int J, size_t... C>
FC_INLINE void add_column(DepthwiseTile& tile, const V (&taps)[KW], const float* first, int64_t step, Range inside,
                          std::index_sequence<C...>) {
  const float* pixel = first + J * step;
  if constexpr (Edge) {
    if (J < inside.begin || J >= inside.end) pixel = kDepthwiseZeros;
    asm volatile("" : "+r"(pixel));  // or GCC loads all columns first and spills them
  }
  const V x = load(pixel);
  (add_tap<KW, S, J, C>(tile, taps, x), ...);
}

// Adds one row of a kernel that is KW wide, for outputs S input pixels apart. `first` is the first pixel under the
// tile.
template <int KW, int S, bool Edge, size_t... J>
FC_INLINE void add_kernel_row(DepthwiseTile& tile, const V (&taps)[KW], const float* first, int64_t step, Range inside,
                              std::index_sequence<J...>) {
  (add_column<KW, S, Edge, J>(tile, taps, first, step, inside, std::make_index_sequence<kDepthwiseColumns>()), ...);
}

// Where a tile reads and writes.
struct DepthwisePlace {
  const float* input;  // the first row under the kernel that is inside the image
  Range ky;            // rows of the kernel inside the image
  int64_t x;           // of the input pixel under the first tap; may be left of the image
  int64_t output;      // offset of the first output pixel
  int64_t columns;     // outputs that are inside the map
  Range blocks;
};

template <size_t... C>
FC_INLINE void store_sums(const DepthwiseTile& tile, const Epilogue& e, float* output, int64_t offset, int64_t pitch,
                          V bias, std::index_sequence<C...>) {
  (store(output + offset + C * pitch, finish(tile.sums[C], e, offset + C * pitch, bias)), ...);
}

// Where the map ends within the tile. The detour through memory keeps the sums in registers until here.
template <size_t... C>
FC_INLINE void store_some_sums(const DepthwiseTile& tile, const Epilogue& e, float* output, int64_t offset,
                               int64_t pitch, V bias, int64_t columns, std::index_sequence<C...>) {
  alignas(64) float sums[kDepthwiseColumns * kLanes];
  (store(sums + C * kLanes, tile.sums[C]), ...);
  for (int64_t x = 0; x < columns; ++x, offset += pitch)
    store(output + offset, finish(load(sums + x * kLanes), e, offset, bias));
}

// The blocks of a tile. Edge where it reaches over a side of the image.
template <int KW, int S, bool Edge>
FC_KERNEL void depthwise_tile(const DepthwiseConv& c, const DepthwisePlace& place) {
  const ConvGeometry& g = c.geometry;
  constexpr std::make_index_sequence<kDepthwiseColumns> each;
  constexpr int kUnder = (kDepthwiseColumns - 1) * S + KW;  // input columns under a tile
  // Copies, because the compiler must assume that stores of outputs change what c points to.
  const DepthwisePlace at = place;
  const Epilogue e = c.epilogue;
  float* const output = c.output;
  const int64_t pitch = g.pitch, row_step = g.in_width * pitch, block_weights = g.kernel_h * KW * kLanes;
  const Range inside{-at.x, g.in_width - at.x};
  const float* pixels = at.input + at.x * pitch + at.blocks.begin * kLanes;
  const float* weights = c.weights + at.blocks.begin * block_weights + at.ky.begin * KW * kLanes;
  for (int64_t channel = at.blocks.begin * kLanes; channel < at.blocks.end * kLanes;
       channel += kLanes, pixels += kLanes, weights += block_weights) {
    DepthwiseTile tile{};
    const float *row = pixels, *row_weights = weights;
    for (int64_t ky = at.ky.begin; ky < at.ky.end; ++ky, row += row_step, row_weights += KW * kLanes) {
      V taps[KW];
      load_vectors(taps, row_weights, std::make_index_sequence<KW>());
      add_kernel_row<KW, S, Edge>(tile, taps, row, pitch, inside, std::make_index_sequence<kUnder>());
    }
    const V bias = load(e.bias + channel);
    if (at.columns == kDepthwiseColumns)
      store_sums(tile, e, output, at.output + channel, pitch, bias, each);
    else
      store_some_sums(tile, e, output, at.output + channel, pitch, bias, at.columns, each);
  }
}

template <int KW, int S>
static void depthwise_row(const DepthwiseConv& c, DepthwisePlace at) {
  const ConvGeometry& g = c.geometry;
  const int64_t last = (kDepthwiseColumns - 1) * S + KW;
  for (int64_t x = 0; x < g.width; x += kDepthwiseColumns) {
    at.columns = std::min<int64_t>(kDepthwiseColumns, g.width - x);
    const bool inside = at.x >= 0 && at.x + last <= g.in_width;
    (inside ? depthwise_tile<KW, S, false> : depthwise_tile<KW, S, true>)(c, at);
    finish_stored(c.epilogue, c.output, at.output + at.blocks.begin * kLanes, g.pitch, at.columns,
                  at.blocks.end - at.blocks.begin);
    at.x += kDepthwiseColumns * S;
    at.output += kDepthwiseColumns * g.pitch;
  }
}

// Other sizes, strides and dilations, one output pixel at a time.
static void depthwise_row_of_any(const DepthwiseConv& c, DepthwisePlace at) {
  const ConvGeometry& g = c.geometry;
  const int64_t row_step = g.dilation_h * g.in_width * g.pitch, weights_step = g.kernel_w * kLanes;
  for (int64_t x = 0; x < g.width; ++x, at.x += g.stride_w, at.output += g.pitch) {
    const Range kx = inside_taps(at.x, g.kernel_w, g.dilation_w, g.in_width);
    for (int64_t channel = at.blocks.begin * kLanes; channel < at.blocks.end * kLanes; channel += kLanes) {
      V sum = zero();
      const float* row = at.input + at.x * g.pitch + channel;
      const float* weights = c.weights + (channel * g.kernel_h + at.ky.begin * kLanes) * g.kernel_w;
      for (int64_t ky = at.ky.begin; ky < at.ky.end; ++ky, row += row_step, weights += weights_step)
        for (int64_t i = kx.begin; i < kx.end; ++i)
          sum = fma(load(row + i * g.dilation_w * g.pitch), load(weights + i * kLanes), sum);
      store(c.output + at.output + channel,
            finish(sum, c.epilogue, at.output + channel, load(c.epilogue.bias + channel)));
    }
    finish_stored(c.epilogue, c.output, at.output + at.blocks.begin * kLanes, g.pitch, 1,
                  at.blocks.end - at.blocks.begin);
  }
}

using DepthwiseRow = void (*)(const DepthwiseConv&, DepthwisePlace);

static DepthwiseRow depthwise_row_of(const ConvGeometry& g) {
  static constexpr DepthwiseRow table[3][2] = {{depthwise_row<3, 1>, depthwise_row<3, 2>},
                                               {depthwise_row<5, 1>, depthwise_row<5, 2>},
                                               {depthwise_row<7, 1>, depthwise_row<7, 2>}};
  const bool known = (g.kernel_w == 3 || g.kernel_w == 5 || g.kernel_w == 7) && g.stride_w <= 2 && g.dilation_h == 1 &&
                     g.dilation_w == 1;
  return known ? table[g.kernel_w / 2 - 1][g.stride_w - 1] : depthwise_row_of_any;
}

// `rows` counts output rows over all instances.
static void conv_depthwise_f32(const DepthwiseConv& c, Range rows, Range blocks) {
  const ConvGeometry& g = c.geometry;
  const DepthwiseRow run = depthwise_row_of(c.geometry);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / g.height, y = row % g.height * g.stride_h - g.pad_top;
    const Range ky = inside_taps(y, g.kernel_h, g.dilation_h, g.in_height);
    const int64_t first = image * g.in_height + y + ky.begin * g.dilation_h;
    run(c, {c.input + first * g.in_width * g.pitch, ky, -g.pad_left, row * g.width * g.pitch, 0, blocks});
  }
}
