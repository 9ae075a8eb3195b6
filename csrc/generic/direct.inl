// Direct convolution with any kernel size, stride, dilation and groups; also 1×1 convolutions and linear layers.

// Where the output pixels of a register tile read and write.
struct PixelRows {
  const float* in[kMr];
  int64_t out[kMr];  // offset of the pixel's first channel in the output
};

// Stores the accumulators in the output, or adds them to what is there. Another part of the sum follows.
template <int R, int B, size_t... I>
FC_INLINE void store_partial_sums(const DirectConv& c, const Accumulators<R, B>& acc, const PixelRows& pixels,
                                  int64_t channel, bool first, std::index_sequence<I...>) {
  if (first)
    (store(c.output + pixels.out[I / B] + channel + (I % B) * kLanes, acc.v[I]), ...);
  else
    (store(c.output + pixels.out[I / B] + channel + (I % B) * kLanes,
           add(load(c.output + pixels.out[I / B] + channel + (I % B) * kLanes), acc.v[I])),
     ...);
}

// Adds the parts of the sum that are in the output to the accumulators.
template <int R, int B, size_t... I>
FC_INLINE void add_partial_sums(const DirectConv& c, Accumulators<R, B>& acc, const PixelRows& pixels, int64_t channel,
                                std::index_sequence<I...>) {
  ((acc.v[I] = add(load(c.output + pixels.out[I / B] + channel + (I % B) * kLanes), acc.v[I])), ...);
}

// Finishes the sums and stores them.
template <int R, int B, size_t... I>
FC_INLINE void store_tile(const DirectConv& c, const Accumulators<R, B>& acc, const PixelRows& pixels, int64_t channel,
                          std::index_sequence<I...>) {
  (store(c.output + pixels.out[I / B] + channel + (I % B) * kLanes,
         finish(acc.v[I], c.epilogue, pixels.out[I / B] + channel + (I % B) * kLanes,
                load(c.epilogue.bias + channel + (I % B) * kLanes))),
   ...);
}

template <size_t... I>
FC_INLINE void offset_rows(const float* (&rows)[sizeof...(I)], const float* const* origins, int64_t offset,
                           std::index_sequence<I...>) {
  ((rows[I] = origins[I] + offset), ...);
}

// One register tile: R pixels × B blocks of output channels.
template <int R, int B>
FC_KERNEL void direct_tile(const DirectConv& c, const PixelRows& pixels, int64_t in_channel, int64_t channel,
                           const float* weights) {
  constexpr std::make_index_sequence<R * B> each;
  Accumulators<R, B> acc;
  clear<R, B>(acc, each);
  int64_t terms = 0, parts = 0;
  for (int64_t t = 0; t < c.taps; ++t)
    for (int64_t i = 0; i < c.depth; i += kKc) {
      if (terms >= kKc) {
        store_partial_sums<R, B>(c, acc, pixels, channel, parts++ == 0, each);
        clear<R, B>(acc, each);
        terms = 0;
      }
      const int64_t depth = std::min(kKc, c.depth - i);
      const float* rows[R];
      offset_rows(rows, pixels.in, c.tap_offsets[t] + in_channel + i, std::make_index_sequence<R>());
      weights = accumulate<1>(acc, rows, depth, weights);
      terms += depth;
    }
  if (parts) add_partial_sums<R, B>(c, acc, pixels, channel, each);
  store_tile<R, B>(c, acc, pixels, channel, each);
}

using DirectTile = void (*)(const DirectConv&, const PixelRows&, int64_t, int64_t, const float*);

template <int B, size_t... R>
inline DirectTile direct_tile_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr DirectTile table[] = {direct_tile<R + 1, B>...};
  return table[rows - 1];
}

inline DirectTile direct_tile_of(int64_t rows, int64_t blocks) {
  constexpr std::make_index_sequence<kMr> counts;
  return blocks == kNrBlocks ? direct_tile_of<kNrBlocks>(rows, counts) : direct_tile_of<1>(rows, counts);
}

// Walks the output pixels in memory order.
struct PixelCursor {
  const DirectConv& c;
  int64_t x, y, pixel;
  const float* row_origin;    // of (y, 0)
  const float* image_origin;  // of (0, 0)

  PixelCursor(const DirectConv& conv, int64_t first) : c(conv), pixel(first) {
    const int64_t per_image = c.height * c.width;
    const int64_t image = first / per_image, rest = first % per_image;
    y = rest / c.width;
    x = rest % c.width;
    image_origin = c.input + image * c.image_step;
    row_origin = image_origin + y * c.row_step;
  }

  void next(PixelRows& pixels, int64_t r) {
    pixels.in[r] = row_origin + x * c.pixel_step;
    pixels.out[r] = pixel++ * c.pitch;
    if (++x < c.width) return;
    x = 0;
    row_origin += c.row_step;
    if (++y < c.height) return;
    y = 0;
    image_origin += c.image_step;
    row_origin = image_origin;
  }
};

static void conv_direct_f32(const DirectConv& c, Range pixels, Range blocks) {
  int64_t width;  // blocks of the register tile
  for (int64_t block = blocks.begin; block < blocks.end; block += width) {
    const int64_t group = block / c.blocks_per_group;
    const int64_t left = std::min(blocks.end, (group + 1) * c.blocks_per_group) - block;
    width = left >= kNrBlocks ? kNrBlocks : 1;
    const float* weights = c.weights + block * kLanes * c.taps * c.depth;
    PixelCursor cursor(c, pixels.begin);
    for (int64_t p = pixels.begin; p < pixels.end; p += kMr) {
      const int64_t rows = std::min<int64_t>(kMr, pixels.end - p);
      PixelRows tile;
      for (int64_t r = 0; r < rows; ++r) cursor.next(tile, r);
      direct_tile_of(rows, width)(c, tile, group * c.group_channels, block * kLanes, weights);
      finish_stored(c.epilogue, c.output, p * c.pitch + block * kLanes, c.pitch, rows, width);
    }
  }
}
