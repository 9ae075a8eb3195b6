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
  const float *input, *weights;  // of the group, of the panel
  Range taps, terms;             // terms of each tap
  int64_t tap_weights;           // of a tap
  bool is_first, is_last;
};

// Output pixels a constant step apart, along a row or a column of the map, that have the same taps inside the image.
struct PixelRun {
  int64_t input;   // offset of what is under the first pixel's first tap; may lie outside the image
  int64_t output;  // offset of the first pixel
  int64_t count, input_step, output_step;
  Range ky, kx, terms;  // what is inside: rows and columns of taps, terms of each tap
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

FC_INLINE Range intersect(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }
FC_INLINE bool contains(Range r, int64_t i) { return r.begin <= i && i < r.end; }

// Tiles of R pixels × B blocks along a run, whose length is a multiple of R. `channel` is the panel's first.
template <int R, int B>
FC_KERNEL void direct_tiles(const DirectConv& c, const DirectPart& in_part, const PixelRun& in_run, int64_t channel) {
  constexpr std::make_index_sequence<R * B> each;
  // Copies, because the compiler must assume that stores of outputs change what the references point to.
  const DirectPart part = in_part;
  const PixelRun run = in_run;
  const Epilogue e = c.epilogue;
  const Tap* const taps = c.taps;
  float* const output = c.output;
  const Range terms = intersect(part.terms, run.terms);
  const float* input = part.input + run.input + terms.begin;
  const int64_t begin = run.output + channel, end = begin + run.count * run.output_step;
  for (int64_t offset = begin; offset < end; offset += R * run.output_step, input += R * run.input_step) {
    Accumulators<R, B> acc;
    clear<R, B>(acc, each);
    const float* weights = part.weights + (terms.begin - part.terms.begin) * B * kLanes;
    for (int64_t t = part.taps.begin; t < part.taps.end; ++t, weights += part.tap_weights) {
      if (!contains(run.ky, taps[t].y) || !contains(run.kx, taps[t].x)) continue;
      accumulate<1>(acc, input_rows<R>(input + taps[t].offset, run.input_step), terms.end - terms.begin, weights);
    }
    if (!part.is_first) add_partial_sums<R, B>(acc, output + offset, run.output_step, each);
    if (part.is_last)
      store_tile<R, B>(acc, e, e.bias + channel, output, offset, run.output_step, each);
    else
      store_partial_sums<R, B>(acc, output + offset, run.output_step, each);
  }
}

using DirectTiles = void (*)(const DirectConv&, const DirectPart&, const PixelRun&, int64_t);

template <int B, size_t... R>
inline DirectTiles direct_tiles_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr DirectTiles table[] = {direct_tiles<R + 1, B>...};
  return table[rows - 1];
}

// Divides a run into tiles of at most kDirectRows[B] pixels that differ by one pixel at most, because small tiles are
// slow.
template <int B>
static void run_tiles(const DirectConv& c, const DirectPart& part, PixelRun run, int64_t channel) {
  constexpr int64_t limit = kDirectRows[B - 1];
  const int64_t tiles = divide_up(run.count, limit), rows = run.count / tiles, larger = run.count % tiles;
  const auto run_some = [&](int64_t count, int64_t size) {
    if (count == 0) return;
    run.count = count * size;
    direct_tiles_of<B>(size, std::make_index_sequence<limit>())(c, part, run, channel);
    if (part.is_last) finish_stored(c.epilogue, c.output, run.output + channel, run.output_step, run.count, B);
    run.input += run.count * run.input_step;
    run.output += run.count * run.output_step;
  };
  run_some(larger, rows + 1);
  run_some(tiles - larger, rows);
}

// The taps of a kernel of `size` that lie inside the image along one axis, where the first is at input pixel `at`.
FC_INLINE Range inside_taps(int64_t at, int64_t size, int64_t dilation, int64_t limit) {
  const int64_t begin = at < 0 ? std::min(size, (-at + dilation - 1) / dilation) : 0;
  return {begin, std::max(begin, std::min(size, (limit - at + dilation - 1) / dilation))};
}

// The outputs along one axis that have all taps inside the image.
static Range interior(int64_t outputs, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad, int64_t limit) {
  const int64_t last = limit - 1 - (kernel - 1) * dilation + pad;  // of the first tap, in padded pixels
  const int64_t begin = std::min(outputs, divide_up(pad, stride));
  return {begin, std::max(begin, last < 0 ? 0 : std::min(outputs, last / stride + 1))};
}

// Calls visit(run) for output pixels [x] × [y] of one image, all of which have the same taps inside. They become rows,
// or columns where a row is a single pixel.
template <class Visit>
FC_INLINE void visit_block(const DirectConv& c, int64_t image, Range x, Range y, Visit visit) {
  if (x.begin >= x.end || y.begin >= y.end) return;
  const int64_t top = y.begin * c.stride_h - c.pad_top, left = x.begin * c.stride_w - c.pad_left;
  const int64_t row_step = c.in_width * c.in_pitch;
  PixelRun run;
  run.ky = inside_taps(top, c.kernel_h, c.dilation_h, c.in_height);
  run.kx = inside_taps(left, c.kernel_w, c.dilation_w, c.in_width);
  run.terms = {0, c.depth};
  if (c.joins_columns) {
    run.terms = {run.kx.begin * c.in_pitch, run.kx.end * c.in_pitch};
    run.kx = {0, 1};
  }
  run.input = (image * c.in_height + top) * row_step + left * c.in_pitch;
  run.output = ((image * c.height + y.begin) * c.width + x.begin) * c.pitch;
  if (x.end - x.begin == 1) {
    run.count = y.end - y.begin;
    run.input_step = c.stride_h * row_step;
    run.output_step = c.width * c.pitch;
    return visit(run);
  }
  run.count = x.end - x.begin;
  run.input_step = c.stride_w * c.in_pitch;
  run.output_step = c.pitch;
  for (int64_t row = y.begin; row < y.end; ++row) {
    visit(run);
    run.input += c.stride_h * row_step;
    run.output += c.width * c.pitch;
  }
}

// Calls visit(run) for output rows [y] of one image. All of them have the same rows of taps inside.
template <class Visit>
FC_INLINE void visit_rows(const DirectConv& c, int64_t image, Range y, Visit visit) {
  if (y.begin >= y.end) return;
  const Range inside = interior(c.width, c.kernel_w, c.stride_w, c.dilation_w, c.pad_left, c.in_width);
  visit_block(c, image, inside, y, visit);
  for (int64_t x = 0; x < c.width; ++x)
    if (x == inside.begin && x < inside.end)
      x = inside.end - 1;
    else
      visit_block(c, image, {x, x + 1}, y, visit);
}

// Calls visit(run) for the runs that make up output rows [rows], counted over all instances.
template <class Visit>
FC_INLINE void for_each_run(const DirectConv& c, Range rows, Visit visit) {
  const Range inside = interior(c.height, c.kernel_h, c.stride_h, c.dilation_h, c.pad_top, c.in_height);
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t image = row / c.height, first = image * c.height;
    const Range y{row - first, std::min(rows.end - first, c.height)};
    for (int64_t edge = y.begin; edge < std::min(y.end, inside.begin); ++edge)
      visit_rows(c, image, {edge, edge + 1}, visit);
    visit_rows(c, image, intersect(y, inside), visit);
    for (int64_t edge = std::max(y.begin, inside.end); edge < y.end; ++edge)
      visit_rows(c, image, {edge, edge + 1}, visit);
    row = first + y.end;
  }
}

// One panel for a chunk of rows. Parts are of equal size, as far as possible; they depend on the layer alone.
template <int B>
static void multiply_panel(const DirectConv& c, Range rows, int64_t group, int64_t channel, const float* weights) {
  const int64_t whole_taps = divide_up(c.tap_count, divide_up(c.tap_count, std::max<int64_t>(1, kDirectKc / c.depth)));
  const int64_t slice = std::min(c.depth, 4 * divide_up(c.depth, 4 * divide_up(c.depth, kDirectKc)));
  DirectPart part;
  part.input = c.input + group * c.group_channels;
  part.weights = weights;
  for (int64_t tap = 0; tap < c.tap_count; tap += whole_taps)
    for (int64_t i = 0; i < c.depth; i += slice) {
      part.taps = {tap, std::min(tap + whole_taps, c.tap_count)};
      part.terms = {i, std::min(i + slice, c.depth)};
      part.tap_weights = (part.terms.end - i) * B * kLanes;
      part.is_first = tap == 0 && i == 0;
      part.is_last = part.taps.end == c.tap_count && part.terms.end == c.depth;
      for_each_run(c, rows, [&](const PixelRun& run) { run_tiles<B>(c, part, run, channel); });
      part.weights += (part.taps.end - tap) * part.tap_weights;
    }
}

static void multiply_panel(const DirectConv& c, Range rows, int64_t group, int64_t block, int64_t blocks) {
  static_assert(kPanelBlocks == 3);
  const auto multiply = blocks == 3 ? multiply_panel<3> : blocks == 2 ? multiply_panel<2> : multiply_panel<1>;
  multiply(c, rows, group, block * kLanes, c.weights + block * kLanes * c.tap_count * c.depth);
}

// Rows whose inputs make a chunk.
static int64_t chunk_rows(const DirectConv& c) {
  const int64_t inputs = c.stride_h * c.in_width * c.in_pitch;  // of a row
  return std::max({kChunkFloats / inputs, kMinChunkPixels / c.width, int64_t{1}});
}

static void conv_direct_f32(const DirectConv& c, Range rows, Range panels) {
  const int64_t per_group = panel_count(c.blocks_per_group), chunk = chunk_rows(c);
  for (int64_t row = rows.begin; row < rows.end; row += chunk)
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t group = panel / per_group, in_group = panel % per_group;
      const int64_t begin = panel_begin(c.blocks_per_group, in_group),
                    end = panel_begin(c.blocks_per_group, in_group + 1);
      multiply_panel(c, {row, std::min(row + chunk, rows.end)}, group, group * c.blocks_per_group + begin, end - begin);
    }
}
