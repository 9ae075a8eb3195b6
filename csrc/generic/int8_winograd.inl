// Winograd F(2×2, 3×3) in integers, for kernels whose terms have 16 bits (Lavin & Gray 2016, "Fast algorithms for
// convolutional neural networks"). Inputs are transformed by sums and differences of bytes, at most ±1020. Weights are
// transformed by 2 G instead of G, at most ±1143 (int8_steps.cpp), so that nothing is a fraction: the sums are
// exactly four times those of a direct convolution, to the bit. H is a vector of kTermLanes terms.
//
// A tile is 2×2 outputs and the 4×4 inputs under them. Scratch holds 16 slots of transformed inputs, [tile][term], and
// the products of one panel, [16][tile][channel].

struct FourTerms {
  H v0, v1, v2, v3;
};
struct FourSums {
  I v0, v1, v2, v3;
};
struct TwoSums {
  I v0, v1;
};

// Bᵀ d for one line of four.
FC_INLINE FourTerms transform_line(const FourTerms& d) {
  return {sub_terms(d.v0, d.v2), add_terms(d.v1, d.v2), sub_terms(d.v2, d.v1), sub_terms(d.v1, d.v3)};
}
// Aᵀ m for one line of four.
FC_INLINE TwoSums transform_sums(const FourSums& m) { return {add(add(m.v0, m.v1), m.v2), sub(sub(m.v1, m.v2), m.v3)}; }

// The first output pixel of a tile.
FC_INLINE PixelPlace tile_place(int64_t tile, const ConvGeometry& g) {
  const int64_t across = (g.width + 1) / 2, down = (g.height + 1) / 2;
  return {tile / across / down, tile / across % down * 2, tile % across * 2};
}

FC_INLINE void step_tile(PixelPlace& p, const ConvGeometry& g) {
  if ((p.x += 2) < g.width) return;
  p.x = 0;
  if ((p.y += 2) < g.height) return;
  p.y = 0;
  ++p.image;
}

// The input pixels under a tile, row by row; padding outside the image.
FC_INLINE void find_tile_pixels(const Int8Conv& c, const PixelPlace& at, const uint8_t* (&pixels)[16]) {
  const ConvGeometry& g = c.geometry;
  const int64_t top = at.y - g.pad_top, left = at.x - g.pad_left;
  const int64_t pitch = g.in_pitch, row = g.in_width * pitch;
  const int64_t first = (at.image * g.in_height + top) * row + left * pitch;
  if (top >= 0 && left >= 0 && top + 4 <= g.in_height && left + 4 <= g.in_width) {
    for (int64_t i = 0; i < 16; ++i) pixels[i] = c.input + (first + i / 4 * row + i % 4 * pitch);
    return;
  }
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t y = top + i / 4, x = left + i % 4;
    const bool inside = y >= 0 && y < g.in_height && x >= 0 && x < g.in_width;
    pixels[i] = inside ? c.input + (first + i / 4 * row + i % 4 * pitch) : c.padding;
  }
}

// Transforms kTermLanes channels of a tile into v[k * slot].
FC_INLINE void transform_tile_terms(const uint8_t* const (&pixels)[16], int64_t channel, Term* v, int64_t slot) {
  const auto column = [&](int64_t j) {
    return transform_line({widen(pixels[j] + channel), widen(pixels[4 + j] + channel), widen(pixels[8 + j] + channel),
                           widen(pixels[12 + j] + channel)});
  };
  const auto store_row = [&](int64_t i, H a, H b, H c, H d) {
    const FourTerms row = transform_line({a, b, c, d});
    store_terms(v + 4 * i * slot, row.v0);
    store_terms(v + (4 * i + 1) * slot, row.v1);
    store_terms(v + (4 * i + 2) * slot, row.v2);
    store_terms(v + (4 * i + 3) * slot, row.v3);
  };
  const FourTerms x0 = column(0), x1 = column(1), x2 = column(2), x3 = column(3);
  store_row(0, x0.v0, x1.v0, x2.v0, x3.v0);
  store_row(1, x0.v1, x1.v1, x2.v1, x3.v1);
  store_row(2, x0.v2, x1.v2, x2.v2, x3.v2);
  store_row(3, x0.v3, x1.v3, x2.v3, x3.v3);
}

// One group of channels of some tiles. Whole vectors are written; what exceeds a tile's terms is overwritten by the
// next tile or lies behind the last.
FC_KERNEL void transform_int8_input(const Int8Conv& c, Range tiles, int64_t group, Term* v, int64_t slot) {
  const int64_t first = group * c.group_channels;
  PixelPlace at = tile_place(tiles.begin, c.geometry);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, step_tile(at, c.geometry), v += c.tap_terms) {
    const uint8_t* pixels[16];
    find_tile_pixels(c, at, pixels);
    for (int64_t i = 0; i < c.tap_terms; i += kTermLanes) transform_tile_terms(pixels, first + i, v + i, slot);
  }
}

template <int R, int B, size_t... J>
FC_INLINE void store_sums(const Int8Sums<R, B>& sums, int32_t* m, std::index_sequence<J...>) {
  (store_i32(m + static_cast<int64_t>(J) * kLanes, sums.v[J]), ...);
}

// m[r][b] = Σ_i v[r][i] · u[i][b] for R tiles and B blocks.
template <int R, int B>
FC_KERNEL void int8_product(const Term* v, const Term* u, int64_t depth, int32_t* m) {
  constexpr std::make_index_sequence<R * B> each;
  Int8Sums<R, B> sums;
  clear_sums<R, B>(sums, each);
  add_run<R, B>(sums, v, depth, depth, u);
  store_sums<R, B>(sums, m, each);
}

using Int8Product = void (*)(const Term*, const Term*, int64_t, int32_t*);

template <int B, size_t... R>
inline Int8Product int8_product_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr Int8Product table[] = {int8_product<R + 1, B>...};
  return table[rows - 1];
}

// Transforms one block of channels of a tile back and stores its outputs that lie inside the map.
FC_KERNEL void transform_int8_output(const Int8Conv& c, const PixelPlace& at, const int32_t* m, int64_t slot,
                                     int64_t channel) {
  const auto column = [&](int64_t j) {
    return transform_sums({load_i32(m + j * slot), load_i32(m + (4 + j) * slot), load_i32(m + (8 + j) * slot),
                           load_i32(m + (12 + j) * slot)});
  };
  const TwoSums x0 = column(0), x1 = column(1), x2 = column(2), x3 = column(3);
  const TwoSums top = transform_sums({x0.v0, x1.v0, x2.v0, x3.v0}),
                bottom = transform_sums({x0.v1, x1.v1, x2.v1, x3.v1});
  // Copies, because the compiler must assume that stores of outputs change what c points to.
  const Int8Epilogue e = c.epilogue;
  const int64_t height = c.geometry.height, width = c.geometry.width, pitch = c.geometry.pitch;
  void* const output = c.output;
  const int64_t offset = ((at.image * height + at.y) * width + at.x) * pitch + channel, next = width * pitch;
  const I start = load_i32(e.start + channel);
  const bool right = at.x + 1 < width, below = at.y + 1 < height;
  store_output(add(quarter(top.v0), start), e, output, channel, offset);
  if (right) store_output(add(quarter(top.v1), start), e, output, channel, offset + pitch);
  if (below) store_output(add(quarter(bottom.v0), start), e, output, channel, offset + next);
  if (right && below) store_output(add(quarter(bottom.v1), start), e, output, channel, offset + next + pitch);
}

// One panel for the tiles of a pass.
template <int B>
static void multiply_winograd_panel(const Int8Conv& c, const Term* v, int64_t slot, Range tiles, int64_t block,
                                    int32_t* m) {
  constexpr std::make_index_sequence<kRows> counts;
  constexpr int64_t width = B * kLanes;
  const int64_t depth = c.tap_terms, count = tiles.end - tiles.begin, channel = block * kLanes;
  const Term* u = static_cast<const Term*>(c.weights) + 16 * channel * depth;
  for (int64_t k = 0; k < 16; ++k, u += width * depth)
    for (int64_t tile = 0; tile < count; tile += kRows) {
      const int64_t rows = count - tile < kRows ? count - tile : kRows;
      int8_product_of<B>(rows, counts)(v + k * slot + tile * depth, u, depth, m + (k * count + tile) * width);
    }
  PixelPlace at = tile_place(tiles.begin, c.geometry);
  for (int64_t tile = 0; tile < count; ++tile, step_tile(at, c.geometry))
    for (int64_t b = 0; b < B; ++b)
      transform_int8_output(c, at, m + tile * width + b * kLanes, count * width, channel + b * kLanes);
}

static void conv3x3_winograd_int8(const Int8Conv& c, Range tiles, Range panels) {
  const int64_t per_group = int8_panels(c.blocks_per_group), slot = int8_winograd_slot(c);
  Term* const v = static_cast<Term*>(c.scratch);
  auto* const m = reinterpret_cast<int32_t*>(v + 16 * slot);
  for (int64_t tile = tiles.begin; tile < tiles.end; tile += kInt8WinogradTiles) {
    const Range part{tile, tile + kInt8WinogradTiles < tiles.end ? tile + kInt8WinogradTiles : tiles.end};
    int64_t transformed = -1;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t group = panel / per_group, first = panel % per_group * kInt8PanelBlocks;
      if (group != transformed) transform_int8_input(c, part, group, v, slot);
      transformed = group;
      const int64_t block = group * c.blocks_per_group + first;
      if (c.blocks_per_group - first >= kInt8PanelBlocks)
        multiply_winograd_panel<kInt8PanelBlocks>(c, v, slot, part, block, m);
      else
        multiply_winograd_panel<1>(c, v, slot, part, block, m);
    }
  }
}
