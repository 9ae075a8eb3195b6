// Direct convolution with any kernel size, stride, dilation and groups; also 1×1 convolutions and linear layers.
//
// A register tile is a few output pixels of a row × one panel of output channels. A chunk of pixels, whose inputs stay
// in the second-level cache, runs through panel after panel, and each panel adds up its sums part by part: the weights
// of a part stay in the first-level cache for all tiles of the chunk, while partial sums wait in the output.

constexpr int64_t kDirectKc = 128;          // terms of a part, at most
constexpr int64_t kChunkFloats = 48 << 10;  // inputs of a chunk, about
constexpr int64_t kMinChunkPixels = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of all sums: a few taps with all their terms, or some of the terms of one tap.
struct DirectPart {
  Range taps, terms;     // of each tap
  const float* weights;  // of the panel
  bool is_first, is_last;
};

// Adjacent output pixels, whose inputs are pixel_step apart.
struct PixelRun {
  const float* input;
  int64_t output;  // offset of the panel's first channel
  int64_t count;
};

// Adds the partial sums in the output to the accumulators.
template <int R, int B, size_t... I>
FC_INLINE void add_partial_sums(Accumulators<R, B>& acc, const float* output, int64_t pitch,
                                std::index_sequence<I...>) {
  ((acc.v[I] = add(load(output + (I / B) * pitch + (I % B) * kLanes), acc.v[I])), ...);
}

template <int R, int B, size_t... I>
FC_INLINE void store_partial_sums(const Accumulators<R, B>& acc, float* output, int64_t pitch,
                                  std::index_sequence<I...>) {
  (store(output + (I / B) * pitch + (I % B) * kLanes, acc.v[I]), ...);
}

template <int R, int B, size_t... I>
FC_INLINE void store_tile(const Accumulators<R, B>& acc, const Epilogue& e, const float* bias, float* output,
                          int64_t offset, int64_t pitch, std::index_sequence<I...>) {
  (store(output + offset + (I / B) * pitch + (I % B) * kLanes,
         finish(acc.v[I], e, offset + (I / B) * pitch + (I % B) * kLanes, load(bias + (I % B) * kLanes))),
   ...);
}

// Tiles of R pixels × B blocks along a run, whose length is a multiple of R.
template <int R, int B>
FC_KERNEL void direct_tiles(const DirectConv& c, const DirectPart& in_part, const PixelRun& run, const float* bias) {
  constexpr std::make_index_sequence<R * B> each;
  // Copies, because the compiler must assume that stores of outputs change what the references point to.
  const DirectPart part = in_part;
  const Epilogue e = c.epilogue;
  float* const output = c.output;
  const int64_t *tap_offsets = c.tap_offsets, step = c.pixel_step, pitch = c.pitch;
  const float* input = run.input + part.terms.begin;
  const int64_t end = run.output + run.count * pitch;
  for (int64_t offset = run.output; offset < end; offset += R * pitch, input += R * step) {
    Accumulators<R, B> acc;
    clear<R, B>(acc, each);
    const float* weights = part.weights;
    for (int64_t t = part.taps.begin; t < part.taps.end; ++t)
      weights =
          accumulate<1>(acc, input_rows<R>(input + tap_offsets[t], step), part.terms.end - part.terms.begin, weights);
    if (!part.is_first) add_partial_sums<R, B>(acc, output + offset, pitch, each);
    if (part.is_last)
      store_tile<R, B>(acc, e, bias, output, offset, pitch, each);
    else
      store_partial_sums<R, B>(acc, output + offset, pitch, each);
  }
}

using DirectTiles = void (*)(const DirectConv&, const DirectPart&, const PixelRun&, const float*);

template <int B, size_t... R>
inline DirectTiles direct_tiles_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr DirectTiles table[] = {direct_tiles<R + 1, B>...};
  return table[rows - 1];
}

// Divides a run into tiles of at most kDirectRows[B] pixels that differ by one pixel at most, because small tiles are
// slow.
template <int B>
static void run_tiles(const DirectConv& c, const DirectPart& part, PixelRun run, const float* bias) {
  constexpr int64_t limit = kDirectRows[B - 1];
  const int64_t tiles = divide_up(run.count, limit), rows = run.count / tiles, larger = run.count % tiles;
  const auto run_some = [&](int64_t count, int64_t size) {
    if (count == 0) return;
    run.count = count * size;
    direct_tiles_of<B>(size, std::make_index_sequence<limit>())(c, part, run, bias);
    run.input += run.count * c.pixel_step;
    run.output += run.count * c.pitch;
  };
  run_some(larger, rows + 1);
  run_some(tiles - larger, rows);
}

// True where all output pixels of all instances are pixel_step apart.
FC_INLINE bool is_one_row(const DirectConv& c) {
  return c.row_step == c.width * c.pixel_step && c.image_step == c.height * c.row_step;
}

// Calls visit(run) for the rows, or parts of rows, that make up the pixels.
template <class Visit>
FC_INLINE void for_each_run(const DirectConv& c, Range pixels, int64_t channel, Visit visit) {
  const int64_t per_image = c.height * c.width;
  for (int64_t p = pixels.begin; p < pixels.end;) {
    const int64_t image = p / per_image, y = p % per_image / c.width, x = p % c.width;
    const int64_t count = is_one_row(c) ? pixels.end - p : std::min(pixels.end - p, c.width - x);
    visit(PixelRun{c.input + image * c.image_step + y * c.row_step + x * c.pixel_step, p * c.pitch + channel, count});
    p += count;
  }
}

// One panel for a chunk of pixels. Parts are of equal size, as far as possible; they depend on the layer alone.
template <int B>
static void multiply_panel(const DirectConv& c, Range pixels, int64_t group, int64_t channel, const float* weights) {
  const int64_t whole_taps = divide_up(c.taps, divide_up(c.taps, std::max<int64_t>(1, kDirectKc / c.depth)));
  const int64_t slice = std::min(c.depth, 4 * divide_up(c.depth, 4 * divide_up(c.depth, kDirectKc)));
  DirectPart part;
  part.weights = weights;
  for (int64_t tap = 0; tap < c.taps; tap += whole_taps)
    for (int64_t i = 0; i < c.depth; i += slice) {
      part.taps = {tap, std::min(tap + whole_taps, c.taps)};
      part.terms = {i, std::min(i + slice, c.depth)};
      part.is_first = tap == 0 && i == 0;
      part.is_last = part.taps.end == c.taps && part.terms.end == c.depth;
      for_each_run(c, pixels, channel, [&](PixelRun run) {
        run.input += group * c.group_channels;
        run_tiles<B>(c, part, run, c.epilogue.bias + channel);
        if (part.is_last) finish_stored(c.epilogue, c.output, run.output, c.pitch, run.count, B);
      });
      part.weights += (part.taps.end - tap) * (part.terms.end - i) * B * kLanes;
    }
}

static void multiply_panel(const DirectConv& c, Range pixels, int64_t group, int64_t block, int64_t blocks) {
  static_assert(kPanelBlocks == 3);
  const auto multiply = blocks == 3 ? multiply_panel<3> : blocks == 2 ? multiply_panel<2> : multiply_panel<1>;
  multiply(c, pixels, group, block * kLanes, c.weights + block * kLanes * c.taps * c.depth);
}

// Pixels whose inputs make a chunk; whole rows, unless all pixels are one row.
static int64_t chunk_pixels(const DirectConv& c) {
  const int64_t pixels = std::max(kMinChunkPixels, kChunkFloats * c.width / c.row_step);
  return is_one_row(c) ? pixels : std::max<int64_t>(1, pixels / c.width) * c.width;
}

static void conv_direct_f32(const DirectConv& c, Range pixels, Range panels) {
  const int64_t per_group = panel_count(c.blocks_per_group), chunk = chunk_pixels(c);
  for (int64_t p = pixels.begin; p < pixels.end; p += chunk)
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t group = panel / per_group, in_group = panel % per_group;
      const int64_t begin = panel_begin(c.blocks_per_group, in_group),
                    end = panel_begin(c.blocks_per_group, in_group + 1);
      multiply_panel(c, {p, std::min(p + chunk, pixels.end)}, group, group * c.blocks_per_group + begin, end - begin);
    }
}
