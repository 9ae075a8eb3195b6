// Winograd F(4×4, 3×3) in fp32: each pass transforms a few tiles, multiplies them and transforms them back while they
// stay in L1 and L2. Lavin & Gray 2016, "Fast algorithms for convolutional neural networks".
//
// A tile is 4×4 outputs and the 6×6 inputs under them. A slot of scratch is [tile][channel]. Transformed input k fills
// slot k + 1. Product k then overwrites slot k, which held input k − 1 and is no longer needed.

struct Six {
  V v0, v1, v2, v3, v4, v5;
};
struct Four {
  V v0, v1, v2, v3;
};

// Bᵀ d for one line of six.
FC_INLINE Six input_transform(const Six& d) {
  const V minus4 = broadcast(-4.f), minus5 = broadcast(-5.f), plus4 = broadcast(4.f);
  const V even = fma(minus4, d.v2, d.v4), odd = fma(minus4, d.v1, d.v3);
  const V even2 = sub(d.v4, d.v2), half = sub(d.v3, d.v1), odd2 = add(half, half);
  return {fma(plus4, d.v0, fma(minus5, d.v2, d.v4)), add(even, odd), sub(even, odd), add(even2, odd2), sub(even2, odd2),
          fma(plus4, d.v1, fma(minus5, d.v3, d.v5))};
}

// Aᵀ m for one line of six.
FC_INLINE Four output_transform(const Six& m) {
  const V a = add(m.v1, m.v2), b = sub(m.v1, m.v2), c = add(m.v3, m.v4), d = sub(m.v3, m.v4);
  return {add(add(m.v0, a), c), fma(broadcast(2.f), d, b), fma(broadcast(4.f), c, a),
          add(fma(broadcast(8.f), d, b), m.v5)};
}

FC_INLINE Six load_six(const float* p, int64_t step) {
  return {load(p), load(p + step), load(p + 2 * step), load(p + 3 * step), load(p + 4 * step), load(p + 5 * step)};
}

FC_INLINE void store_six(float* p, int64_t step, const Six& s) {
  store(p, s.v0);
  store(p + step, s.v1);
  store(p + 2 * step, s.v2);
  store(p + 3 * step, s.v3);
  store(p + 4 * step, s.v4);
  store(p + 5 * step, s.v5);
}

constexpr int64_t kRunTiles = 4;  // horizontal neighbours, whose overlapping columns are transformed once

// Horizontally adjacent tiles of one image.
struct TileRun {
  int64_t image, y, x;  // first output pixel
  int64_t count;
};

// The run that starts at `tile`, of at most `limit` tiles.
FC_INLINE TileRun tile_run(const Winograd& c, int64_t tile, int64_t limit) {
  const int64_t across = (c.width + 3) / 4, per_image = across * ((c.height + 3) / 4);
  const int64_t rest = tile % per_image, column = rest % across;
  return {tile / per_image, rest / across * 4, column * 4, std::min({limit, across - column, kRunTiles})};
}

// Transforms one block of channels of a run into v[k * slot + tile * group_in_pitch].
FC_KERNEL void transform_input_run(const Winograd& c, const TileRun& run, int64_t channel, float* v, int64_t slot) {
  alignas(64) float columns[(4 * kRunTiles + 2) * 6 * kLanes];  // after the vertical transform
  const float* image = c.input + run.image * c.in_height * c.in_width * c.in_pitch + channel;
  const int64_t top = run.y - c.pad_top, left = run.x - c.pad_left;
  const float* rows[6];
  for (int64_t i = 0; i < 6; ++i) {
    const bool inside = top + i >= 0 && top + i < c.in_height;
    rows[i] = inside ? image + (top + i) * c.in_width * c.in_pitch : c.zeros;
  }
  for (int64_t j = 0; j < 4 * run.count + 2; ++j) {
    float* column = columns + j * 6 * kLanes;
    const int64_t x = left + j, at = x * c.in_pitch;
    if (x < 0 || x >= c.in_width) {
      for (int64_t i = 0; i < 6; ++i) store(column + i * kLanes, zero());
    } else {
      store_six(column, kLanes,
                input_transform({load(rows[0] + at), load(rows[1] + at), load(rows[2] + at), load(rows[3] + at),
                                 load(rows[4] + at), load(rows[5] + at)}));
    }
  }
  for (int64_t t = 0; t < run.count; ++t) {
    const float* tile = columns + 4 * t * 6 * kLanes;
    float* to = v + t * c.group_in_pitch;
    for (int64_t i = 0; i < 6; ++i, to += 6 * slot)
      store_six(to, slot, input_transform(load_six(tile + i * kLanes, 6 * kLanes)));
  }
}

static void transform_input(const Winograd& c, int64_t first, int64_t count, float* v, int64_t slot) {
  for (int64_t t = 0; t < count;) {
    const TileRun run = tile_run(c, first + t, count - t);
    for (int64_t channel = 0; channel < c.group_in_pitch; channel += kLanes)
      transform_input_run(c, run, channel, v + t * c.group_in_pitch + channel, slot);
    t += run.count;
  }
}

template <int R, int B, size_t... I>
FC_INLINE void store_products(const Accumulators<R, B>& acc, float* m, int64_t pitch, std::index_sequence<I...>) {
  (store(m + (I / B) * pitch + (I % B) * kLanes, acc.v[I]), ...);
}

template <int R, int B, size_t... I>
FC_INLINE void add_products(Accumulators<R, B>& acc, const float* m, int64_t pitch, std::index_sequence<I...>) {
  ((acc.v[I] = add(load(m + (I / B) * pitch + (I % B) * kLanes), acc.v[I])), ...);
}

template <int R, size_t... I>
FC_INLINE Accumulators<R, 1> add_term_pairs(const Accumulators<R, 2>& acc, std::index_sequence<I...>) {
  return {{pairwise_add(acc.v[2 * I], acc.v[2 * I + 1])...}};
}

// Σ_i rows[r][i] · u[i][b]; advances `u`. An unpaired tail block would need one load per multiply-add, and loads would
// limit a processor with two FMA units. So it takes two terms at a time, in two accumulators of half its channels each,
// with even and odd terms in even and odd lanes.
template <int R, int B>
FC_INLINE Accumulators<R, B> sum_products(const InputRows<R>& rows, int64_t depth, const float*& u) {
  static_assert(kNrBlocks == 2);
  Accumulators<R, kNrBlocks> acc;
  clear<R, kNrBlocks>(acc, std::make_index_sequence<R * kNrBlocks>());
  u = accumulate<kNrBlocks / B>(acc, rows, depth, u);
  if constexpr (B == kNrBlocks)
    return acc;
  else
    return add_term_pairs(acc, std::make_index_sequence<R>());
}

// m[r][b] = Σ_i v[r][i] · u[i][b] for R tiles, B blocks and at most kKc terms; `add_to` adds to m instead.
template <int R, int B>
FC_KERNEL void winograd_product(const float* v, int64_t in_pitch, int64_t depth, const float* u, float* m,
                                int64_t pitch, bool add_to) {
  constexpr std::make_index_sequence<R * B> each;
  Accumulators<R, B> acc = sum_products<R, B>(input_rows<R>(v, in_pitch), depth, u);
  if (add_to) add_products<R, B>(acc, m, pitch, each);
  store_products<R, B>(acc, m, pitch, each);
}

using WinogradProduct = void (*)(const float*, int64_t, int64_t, const float*, float*, int64_t, bool);

template <int B, size_t... R>
inline WinogradProduct winograd_product_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr WinogradProduct table[] = {winograd_product<R + 1, B>...};
  return table[rows - 1];
}

// Terms [first, first + depth) of one product, for all tiles of the pass and `width` blocks that begin at m.
static void multiply_part(const Winograd& c, int64_t tiles, int64_t width, int64_t first, int64_t depth, const float* v,
                          const float* u, float* m) {
  constexpr std::make_index_sequence<kMr> counts;
  for (int64_t r = 0; r < tiles; r += kMr) {
    const int64_t rows = std::min<int64_t>(kMr, tiles - r);
    const auto product =
        width == kNrBlocks ? winograd_product_of<kNrBlocks>(rows, counts) : winograd_product_of<1>(rows, counts);
    product(v + r * c.group_in_pitch + first, c.group_in_pitch, depth, u, m + r * c.group_pitch, c.group_pitch,
            first > 0);
  }
}

// The 36 products, with transformed weights.
static void multiply_transformed(const Winograd& c, int64_t tiles, Range blocks, float* m, int64_t slot) {
  const int64_t depth = winograd_depth(c.channels);
  for (int64_t k = 0; k < 36; ++k) {
    int64_t width;
    for (int64_t block = blocks.begin; block < blocks.end; block += width) {
      width = blocks.end - block >= kNrBlocks ? kNrBlocks : 1;
      const float* u = c.weights + (k * c.group_pitch + block * kLanes) * depth;
      for (int64_t i = 0; i < depth; i += kKc)
        multiply_part(c, tiles, width, i, std::min(kKc, depth - i), c.scratch + (k + 1) * slot, u + i * width * kLanes,
                      m + k * slot + block * kLanes);
    }
  }
}

// 3 G w for one line of three. The factor 3 makes all coefficients exact.
FC_INLINE Six weight_transform(V a, V b, V c) {
  const V half = broadcast(0.5f), even = mul(broadcast(-0.5f), add(a, c)), odd = mul(half, b);
  const V even2 = fma(half, c, mul(broadcast(0.125f), a)), odd2 = mul(broadcast(0.25f), b);
  return {mul(broadcast(0.75f), a), sub(even, odd),   add(even, odd),
          add(even2, odd2),         sub(even2, odd2), mul(broadcast(3.f), c)};
}

// G w Gᵀ for every vector of weights, given as w / 9. Packing and multiply_untransformed both call it, so the bits do
// not depend on when weights are transformed.
static void transform_weights_f32(const float* weights, int64_t vectors, float* u, int64_t plane) {
  for (int64_t i = 0; i < vectors; ++i, weights += 9 * kLanes, u += kLanes) {
    const auto w = [&](int64_t tap) { return load(weights + tap * kLanes); };
    const Six x0 = weight_transform(w(0), w(3), w(6)), x1 = weight_transform(w(1), w(4), w(7)),
              x2 = weight_transform(w(2), w(5), w(8));
    store_six(u, plane, weight_transform(x0.v0, x1.v0, x2.v0));
    store_six(u + 6 * plane, plane, weight_transform(x0.v1, x1.v1, x2.v1));
    store_six(u + 12 * plane, plane, weight_transform(x0.v2, x1.v2, x2.v2));
    store_six(u + 18 * plane, plane, weight_transform(x0.v3, x1.v3, x2.v3));
    store_six(u + 24 * plane, plane, weight_transform(x0.v4, x1.v4, x2.v4));
    store_six(u + 30 * plane, plane, weight_transform(x0.v5, x1.v5, x2.v5));
  }
}

// The same products for a single pass over large weights: streaming the transformed weights from memory takes longer
// than streaming the untransformed ones, a quarter of them, and transforming those. The planes follow the products.
static void multiply_untransformed(const Winograd& c, int64_t tiles, Range blocks, float* m, int64_t slot) {
  const int64_t depth = winograd_depth(c.channels), plane = winograd_plane(kNrBlocks * kLanes);
  float* u = m + 36 * slot;
  int64_t width;
  for (int64_t block = blocks.begin; block < blocks.end; block += width) {
    width = blocks.end - block >= kNrBlocks ? kNrBlocks : 1;
    for (int64_t i = 0; i < depth; i += kKc) {
      const int64_t part = std::min(kKc, depth - i);
      transform_weights_f32(c.untransformed_weights + 9 * (block * depth + i * width) * kLanes, part * width, u, plane);
      for (int64_t k = 0; k < 36; ++k)
        multiply_part(c, tiles, width, i, part, c.scratch + (k + 1) * slot, u + k * plane,
                      m + k * slot + block * kLanes);
    }
  }
}

FC_INLINE void finish_row(const Epilogue& e, const Four& row, float* out, int64_t offset, int64_t pitch, V bias) {
  store(out + offset, finish(row.v0, e, offset, bias));
  store(out + offset + pitch, finish(row.v1, e, offset + pitch, bias));
  store(out + offset + 2 * pitch, finish(row.v2, e, offset + 2 * pitch, bias));
  store(out + offset + 3 * pitch, finish(row.v3, e, offset + 3 * pitch, bias));
}

// The same where the tile extends beyond the right edge.
FC_INLINE void finish_short_row(const Epilogue& e, const Four& row, float* out, int64_t offset, int64_t pitch, V bias,
                                int64_t columns) {
  const V values[4] = {row.v0, row.v1, row.v2, row.v3};
  for (int64_t x = 0; x < columns; ++x) store(out + offset + x * pitch, finish(values[x], e, offset + x * pitch, bias));
}

// The larger of each two neighbours of two rows.
FC_INLINE V pool_four(V a, V b, V c, V d) { return maximum(maximum(a, b), maximum(c, d)); }

// Transforms one block of channels of one tile back and finishes its 4×4 outputs, or their 2×2 maxima. They begin at
// `offset`; `rows` and `columns` of them are inside the map.
template <bool Pools>
FC_KERNEL void transform_output_tile(const Winograd& c, const float* m, int64_t slot, int64_t offset, int64_t rows,
                                     int64_t columns, const float* bias_at) {
  const V bias = load(bias_at);
  const int64_t line = 6 * slot;
  const Four y0 = output_transform(load_six(m, line)), y1 = output_transform(load_six(m + slot, line)),
             y2 = output_transform(load_six(m + 2 * slot, line)), y3 = output_transform(load_six(m + 3 * slot, line)),
             y4 = output_transform(load_six(m + 4 * slot, line)), y5 = output_transform(load_six(m + 5 * slot, line));
  const Four out[4] = {output_transform({y0.v0, y1.v0, y2.v0, y3.v0, y4.v0, y5.v0}),
                       output_transform({y0.v1, y1.v1, y2.v1, y3.v1, y4.v1, y5.v1}),
                       output_transform({y0.v2, y1.v2, y2.v2, y3.v2, y4.v2, y5.v2}),
                       output_transform({y0.v3, y1.v3, y2.v3, y3.v3, y4.v3, y5.v3})};
  // Copies, because the compiler must assume that stores of outputs change what c points to.
  const Epilogue e = c.epilogue;
  float* const output = c.output;
  const int64_t pitch = c.pitch, next = c.out_width * pitch;
  if constexpr (Pools) {
    const V pooled[4] = {
        pool_four(out[0].v0, out[0].v1, out[1].v0, out[1].v1), pool_four(out[0].v2, out[0].v3, out[1].v2, out[1].v3),
        pool_four(out[2].v0, out[2].v1, out[3].v0, out[3].v1), pool_four(out[2].v2, out[2].v3, out[3].v2, out[3].v3)};
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; ++x) {
        const int64_t at = offset + y * next + x * pitch;
        store(output + at, finish(pooled[2 * y + x], e, at, bias));
      }
    return;
  }
  if (rows == 4 && columns == 4) {
    finish_row(e, out[0], output, offset, pitch, bias);
    finish_row(e, out[1], output, offset + next, pitch, bias);
    finish_row(e, out[2], output, offset + 2 * next, pitch, bias);
    finish_row(e, out[3], output, offset + 3 * next, pitch, bias);
    return;
  }
  for (int64_t y = 0; y < rows; ++y) finish_short_row(e, out[y], output, offset + y * next, pitch, bias, columns);
}

static void transform_output(const Winograd& c, int64_t first, int64_t count, Range blocks, const float* m,
                             int64_t slot) {
  const int64_t shrink = c.pools ? 2 : 1, side = 4 / shrink;  // outputs of a tile along one axis
  const auto transform_tile = c.pools ? transform_output_tile<true> : transform_output_tile<false>;
  for (int64_t t = 0; t < count; ++t) {
    const TileRun at = tile_run(c, first + t, 1);
    const int64_t y = at.y / shrink, x = at.x / shrink, pixel = (at.image * c.out_height + y) * c.out_width + x;
    const int64_t rows = std::min(side, c.out_height - y), columns = std::min(side, c.out_width - x);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t channel = block * kLanes;
      transform_tile(c, m + t * c.group_pitch + channel, slot, pixel * c.pitch + channel, rows, columns,
                     c.epilogue.bias + channel);
    }
    for (int64_t row = 0; row < rows; ++row)
      finish_stored(c.epilogue, c.output, (pixel + row * c.out_width) * c.pitch + blocks.begin * kLanes, c.pitch,
                    columns, blocks.end - blocks.begin);
  }
}

// Channels of one group, as a convolution of its own.
static Winograd one_group(Winograd c, int64_t group) {
  const int64_t channel = group * c.group_pitch, weights = c.group_pitch * winograd_depth(c.channels);
  c.input += group * c.channels;
  c.output += channel;
  c.weights += group * 36 * weights;
  if (c.untransformed_weights) c.untransformed_weights += group * 9 * weights;
  c.epilogue.bias += channel;
  if (c.epilogue.residual) c.epilogue.residual += channel;
  if (c.epilogue.residual_after_function) c.epilogue.residual_after_function += channel;
  return c;
}

static void convolve_group(const Winograd& c, Range tiles, Range blocks) {
  const int64_t slot = winograd_slot(c);
  const bool one_pass = tiles.end - tiles.begin <= c.tiles_per_pass;
  const bool untransformed = c.untransformed_weights && one_pass;
  float* m = untransformed ? c.scratch + 37 * slot : c.scratch;  // multiply_untransformed reads inputs more than once
  for (int64_t first = tiles.begin; first < tiles.end; first += c.tiles_per_pass) {
    const int64_t count = std::min(c.tiles_per_pass, tiles.end - first);
    transform_input(c, first, count, c.scratch + slot, slot);
    (untransformed ? multiply_untransformed : multiply_transformed)(c, count, blocks, m, slot);
    transform_output(c, first, count, blocks, m, slot);
  }
}

static void conv3x3_winograd_f32(const Winograd& c, Range tiles, Range panels) {
  const int64_t blocks = c.group_pitch / kLanes, per_group = (blocks + kNrBlocks - 1) / kNrBlocks;
  for (int64_t group = panels.begin / per_group; group * per_group < panels.end; ++group) {
    const int64_t begin = std::max<int64_t>(0, panels.begin - group * per_group);
    const int64_t end = std::min(per_group, panels.end - group * per_group);
    convolve_group(one_group(c, group), tiles, {begin * kNrBlocks, std::min(blocks, end * kNrBlocks)});
  }
}
