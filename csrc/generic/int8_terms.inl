// The terms of a convolution as a matrix product, prepared for a chunk of output pixels and a group of channels.

// Positions whose terms are a constant step apart. Where rows are padded, positions run on through the padding, and
// what is computed there is dropped.
struct Strip {
  const Term* terms;
  int64_t positions;
  int64_t output;               // the first position's, counted over all instances
  int64_t width, padded_width;  // positions of a row, without and with padding
};

static void fill_terms(Term* to, int64_t count, uint8_t value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Pixels of one row of the input: the channels of a group, without what pads them. Writes whole vectors.
FC_INLINE void copy_pixels(const Int8Conv& c, const uint8_t* from, int64_t count, Term* to) {
  const int64_t pitch = c.geometry.in_pitch;
  if (c.tap_terms == pitch) return copy_terms(from, count * pitch, to);
  for (int64_t i = 0; i < count; ++i) copy_terms(from + i * pitch, c.tap_terms, to + i * c.tap_terms);
}

// ---- gathered ----

// The terms of a row of the kernel at one output pixel.
FC_INLINE void gather_kernel_row(const Int8Conv& c, const uint8_t* row, int64_t left, Term* to) {
  const ConvGeometry& g = c.geometry;
  if (g.dilation_w == 1 && left >= 0 && left + g.kernel_w <= g.in_width)
    return copy_pixels(c, row + left * g.in_pitch, g.kernel_w, to);
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
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel, step_pixel(at, g), to += c.position_terms)
    for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
      Term* const row = to + ky * row_terms;
      const int64_t y = at.y * g.stride_h - g.pad_top + ky * g.dilation_h;
      if (y >= 0 && y < g.in_height)
        gather_kernel_row(c, input + (at.image * g.in_height + y) * g.in_width * g.in_pitch,
                          at.x * g.stride_w - g.pad_left, row);
      else
        fill_terms(row, row_terms, c.zero_point);
    }
}

static Strip gathered_strip(const Int8Conv& c, Range pixels, int64_t group, Term* to) {
  gather_terms(c, pixels, group, to);
  const int64_t count = pixels.end - pixels.begin;
  return {to, count, pixels.begin, count, count};
}

// ---- padded ----

// The rows of the input under output rows [rows] of one image, with their padding. Returns the end.
static Term* pad_rows(const Int8Conv& c, Range rows, int64_t group, Term* to) {
  const ConvGeometry& g = c.geometry;
  const int64_t image = rows.begin / g.height, top = rows.begin % g.height * g.stride_h - g.pad_top;
  const int64_t bottom = top + (rows.end - rows.begin - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  const int64_t row_terms = c.row_pixels * c.tap_terms, begin = g.pad_left * c.tap_terms;
  const int64_t pixels = g.in_width < c.row_pixels - g.pad_left ? g.in_width : c.row_pixels - g.pad_left;
  const int64_t end = begin + pixels * c.tap_terms;
  const uint8_t* input = c.input + image * g.in_height * g.in_width * g.in_pitch + group * c.group_channels;
  for (int64_t y = top; y < bottom; ++y, to += row_terms) {
    if (y < 0 || y >= g.in_height) {
      fill_terms(to, row_terms, c.zero_point);
      continue;
    }
    fill_terms(to, begin, c.zero_point);
    copy_pixels(c, input + y * g.in_width * g.in_pitch, pixels, to + begin);
    fill_terms(to + end, row_terms - end, c.zero_point);
  }
  return to;
}

// One strip for every output row, or, where all positions are the same step apart, for every image that output rows
// [rows] reach into. Returns how many.
static int64_t padded_strips(const Int8Conv& c, Range rows, int64_t group, Term* to, Strip* strips) {
  const ConvGeometry& g = c.geometry;
  const int64_t width = c.row_positions(), row_terms = c.row_pixels * c.tap_terms;
  int64_t count = 0;
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t image_end = (row / g.height + 1) * g.height, end = image_end < rows.end ? image_end : rows.end;
    const Term* terms = to;
    to = pad_rows(c, {row, end}, group, to);
    if (c.has_stride()) {
      for (; row < end; ++row, terms += g.stride_h * row_terms)
        strips[count++] = {terms, width, row * width, width, width};
    } else {
      const int64_t padded_width = c.row_pixels / c.joined;
      strips[count++] = {terms, (end - row - 1) * padded_width + width, row * width, width, padded_width};
      row = end;
    }
  }
  return count;
}

// ---- all ----

// Pixels in place; the last few are copied where a tile would read beyond them.
static int64_t placed_strips(const Int8Conv& c, Range pixels, int64_t group, Term* to, Strip* strips) {
  const int64_t whole = (pixels.end - pixels.begin) / kLeastRows * kLeastRows, end = pixels.begin + whole;
  int64_t count = 0;
  if constexpr (sizeof(Term) == 1)
    if (whole > 0) {
      const uint8_t* terms = c.input + pixels.begin * c.geometry.in_pitch + group * c.group_channels;
      strips[count++] = {reinterpret_cast<const Term*>(terms), whole, pixels.begin, whole, whole};
    }
  if (end < pixels.end) strips[count++] = gathered_strip(c, {end, pixels.end}, group, to);
  return count;
}

static int64_t prepare_strips(const Int8Conv& c, Range items, int64_t group, Strip* strips) {
  Term* const to = static_cast<Term*>(c.scratch);
  switch (c.terms) {
    case Int8Terms::in_place: return placed_strips(c, items, group, to, strips);
    case Int8Terms::padded: return padded_strips(c, items, group, to, strips);
    case Int8Terms::gathered: break;
  }
  strips[0] = gathered_strip(c, items, group, to);
  return 1;
}

// Calls visit(first, count, output) for every piece of positions [begin, end) of a strip that lie in one output row;
// `output` is the first one's, counted over all instances.
template <class Visit>
FC_INLINE void for_each_row(const Strip& s, int64_t begin, int64_t end, Visit visit) {
  int64_t row = begin / s.padded_width, x = begin % s.padded_width;
  for (int64_t position = begin; position < end; ++row, x = 0) {
    const int64_t row_end = position + s.width - x, last = row_end < end ? row_end : end;
    if (position < last) visit(position - begin, last - position, s.output + row * s.width + x);
    position += s.padded_width - x;
  }
}
