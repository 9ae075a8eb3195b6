// Direct convolution with any kernel size, stride, dilation and groups; also 1×1 convolutions and linear layers. A
// term is a float, or a pair in bf16.
//
// A register tile is a few output pixels of a row × one panel of output channels. A chunk of pixels, whose inputs stay
// in the second-level cache, runs through panel after panel, and each panel adds up its sums part by part: the weights
// of a part stay in the first-level cache for all tiles of the chunk, while partial sums wait in the output. Weights
// are read once per chunk, from memory where a network is larger than the cache. So where a part is of one tap, every
// term also prefetches a little of the next part's weights: evenly spread, because the processor has few places for
// loads that wait for memory.

constexpr int64_t kDirectKc = kLanes < 16 ? 256 : 128;  // terms of a part, at most: 24 KB of weights
constexpr int64_t kChunkFloats = 48 << 10;              // inputs of a chunk, about
constexpr int64_t kMinChunkPixels = 64;
constexpr int64_t kAheadFloats = kLanes / 2;  // prefetched per term: six tiles prefetch what a panel of three reads

// A part of all sums: a few taps with all their terms, or some of the terms of one tap.
struct DirectPart {
  const float *input, *weights;    // of the group, of the panel
  const float *ahead, *ahead_end;  // what is still to be prefetched of the next part's weights
  Range taps, terms;               // terms of each tap
  int64_t tap_weights;             // of a tap
  bool is_first, is_last;
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

// A loop, because the addresses of fourteen pixels would take registers from the sums.
template <int R, int B>
FC_INLINE void prefetch_tile(const float* first, int64_t pitch) {
  FC_UNROLL(1)
  for (int r = 0; r < R; ++r, first += pitch)
    for (int b = 0; b < B; ++b) __builtin_prefetch(first + b * kLanes);
}

// As accumulate(); prefetches from `ahead`, which may lie beyond the weights, because prefetches never fault.
template <int R, int B>
FC_INLINE void accumulate_ahead(Accumulators<R, B>& acc, const InputRows<R>& rows, int64_t depth, const float* weights,
                                const float* ahead) {
  FC_UNROLL(4)
  for (int64_t i = 0; i < depth; ++i) {
    __builtin_prefetch(ahead + i * kAheadFloats, 0, 2);
    weights = accumulate_term<1>(acc, rows, i, weights);
  }
}

// Tiles of R pixels × B blocks along a run, whose length is a multiple of R. `channel` is the panel's first. With
// OneTap, the part is some terms of a single tap, which lies inside the image: testing it for every tile would take 2 %
// of the time of a 1×1 convolution.
template <int R, int B, bool OneTap>
FC_KERNEL void direct_tiles(const DirectConv& c, DirectPart& in_part, const ConvRun& in_run, int64_t channel) {
  constexpr std::make_index_sequence<R * B> each;
  // Copies, because the compiler must assume that stores of outputs change what the references point to.
  const DirectPart part = in_part;
  const ConvRun run = in_run;
  const Epilogue e = c.epilogue;
  const Tap* const taps = c.taps;
  float* const output = c.output;
  const int64_t pixel = c.geometry.in_pitch;
  const bool joins_columns = !OneTap && c.joins_columns;
  const Range kx = joins_columns ? Range{0, 1} : run.kx;
  const Range terms = joins_columns ? intersect(part.terms, {run.kx.begin * pixel, run.kx.end * pixel}) : part.terms;
  const int64_t depth = terms.end - terms.begin;
  const int64_t taps_end = OneTap ? part.taps.begin + 1 : part.taps.end;
  const float* input = part.input + run.input + terms.begin;
  const float* ahead = part.ahead;
  const int64_t begin = run.output + channel, end = begin + run.count * run.output_step;
  for (int64_t offset = begin; offset < end; offset += R * run.output_step, input += R * run.input_step) {
    if (part.is_last && e.residual) prefetch_tile<R, B>(e.residual + offset, run.output_step);
    Accumulators<R, B> acc;
    clear<R, B>(acc, each);
    const float* weights = part.weights + (terms.begin - part.terms.begin) * B * kLanes;
    for (int64_t t = part.taps.begin; t < taps_end; ++t, weights += part.tap_weights) {
      if (!OneTap && (!contains(run.ky, taps[t].y) || !contains(kx, taps[t].x))) continue;
      const InputRows<R> rows = input_rows<R>(input + taps[t].offset, run.input_step);
      if constexpr (OneTap) {
        accumulate_ahead<R, B>(acc, rows, depth, weights, ahead);
        ahead = std::min(ahead + depth * kAheadFloats, part.ahead_end);
      } else {
        accumulate<1>(acc, rows, depth, weights);
      }
    }
    if (!part.is_first) add_partial_sums<R, B>(acc, output + offset, run.output_step, each);
    if (part.is_last)
      store_tile<R, B>(acc, e, e.bias + channel, output, offset, run.output_step, each);
    else
      store_partial_sums<R, B>(acc, output + offset, run.output_step, each);
  }
  in_part.ahead = ahead;
}

using DirectTiles = void (*)(const DirectConv&, DirectPart&, const ConvRun&, int64_t);

template <int B, bool OneTap, size_t... R>
inline DirectTiles direct_tiles_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr DirectTiles table[] = {direct_tiles<R + 1, B, OneTap>...};
  return table[rows - 1];
}

static bool is_one_tap(const DirectConv& c, const DirectPart& part, const ConvRun& run) {
  const Tap& tap = c.taps[part.taps.begin];
  return part.taps.end - part.taps.begin == 1 && !c.joins_columns && contains(run.ky, tap.y) && contains(run.kx, tap.x);
}

// Divides a run into tiles of at most kDirectRows[B] pixels that differ by one pixel at most, because small tiles are
// slow.
template <int B>
static void run_tiles(const DirectConv& c, DirectPart& part, ConvRun run, int64_t channel) {
  constexpr int64_t limit = kDirectRows[B - 1];
  constexpr std::make_index_sequence<limit> sizes;
  const bool one_tap = is_one_tap(c, part, run);
  const int64_t tiles = divide_up(run.count, limit), rows = run.count / tiles, larger = run.count % tiles;
  const auto run_some = [&](int64_t count, int64_t size) {
    if (count == 0) return;
    run.count = count * size;
    const DirectTiles multiply =
        one_tap ? direct_tiles_of<B, true>(size, sizes) : direct_tiles_of<B, false>(size, sizes);
    multiply(c, part, run, channel);
    if (part.is_last) finish_stored(c.epilogue, c.output, run.output + channel, run.output_step, run.count, B);
    run.input += run.count * run.input_step;
    run.output += run.count * run.output_step;
  };
  run_some(larger, rows + 1);
  run_some(tiles - larger, rows);
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
      const int64_t size = (part.taps.end - tap) * part.tap_weights;
      part.ahead = part.weights + size;
      part.ahead_end = part.ahead + size;
      for_each_run(c.geometry, rows, [&](const ConvRun& run) { run_tiles<B>(c, part, run, channel); });
      part.weights += size;
    }
}

static void multiply_panel(const DirectConv& c, Range rows, int64_t group, int64_t block, int64_t blocks) {
  static_assert(kPanelBlocks == 3);
  const auto multiply = blocks == 3 ? multiply_panel<3> : blocks == 2 ? multiply_panel<2> : multiply_panel<1>;
  multiply(c, rows, group, block * kLanes, c.weights + block * kLanes * c.tap_count * c.depth);
}

// Rows whose inputs make a chunk.
static int64_t chunk_rows(const ConvGeometry& g) {
  const int64_t inputs = g.stride_h * g.in_width * g.in_pitch;  // of a row
  return std::max({kChunkFloats / inputs, kMinChunkPixels / g.width, int64_t{1}});
}

static void conv_direct(const DirectConv& c, Range rows, Range panels) {
  const int64_t per_group = panel_count(c.blocks_per_group), chunk = chunk_rows(c.geometry);
  for (int64_t row = rows.begin; row < rows.end; row += chunk)
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t group = panel / per_group, in_group = panel % per_group;
      const int64_t begin = panel_begin(c.blocks_per_group, in_group),
                    end = panel_begin(c.blocks_per_group, in_group + 1);
      multiply_panel(c, {row, std::min(row + chunk, rows.end)}, group, group * c.blocks_per_group + begin, end - begin);
    }
}
