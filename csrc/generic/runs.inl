// Zero padding without padded maps: the output pixels of a convolution as runs that have the same taps inside the
// image. Inside the map, runs are rows; at its sides, columns.

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FC_INLINE Range intersect(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }
FC_INLINE bool contains(Range r, int64_t i) { return r.begin <= i && i < r.end; }

// Output pixels a constant step apart.
struct ConvRun {
  int64_t input;   // offset of what is under the first pixel's first tap; may lie outside the image
  int64_t output;  // offset of the first pixel
  int64_t count, input_step, output_step;
  Range ky, kx;  // the rows and columns of the kernel that are inside
};

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
FC_INLINE void visit_block(const ConvGeometry& g, int64_t image, Range x, Range y, Visit visit) {
  if (x.begin >= x.end || y.begin >= y.end) return;
  const int64_t top = y.begin * g.stride_h - g.pad_top, left = x.begin * g.stride_w - g.pad_left;
  const int64_t row_step = g.in_width * g.in_pitch;
  ConvRun run;
  run.ky = inside_taps(top, g.kernel_h, g.dilation_h, g.in_height);
  run.kx = inside_taps(left, g.kernel_w, g.dilation_w, g.in_width);
  run.input = (image * g.in_height + top) * row_step + left * g.in_pitch;
  run.output = ((image * g.height + y.begin) * g.width + x.begin) * g.pitch;
  if (x.end - x.begin == 1) {
    run.count = y.end - y.begin;
    run.input_step = g.stride_h * row_step;
    run.output_step = g.width * g.pitch;
    return visit(run);
  }
  run.count = x.end - x.begin;
  run.input_step = g.stride_w * g.in_pitch;
  run.output_step = g.pitch;
  for (int64_t row = y.begin; row < y.end; ++row) {
    visit(run);
    run.input += g.stride_h * row_step;
    run.output += g.width * g.pitch;
  }
}

// Calls visit(run) for output rows [y] of one image. All of them have the same rows of taps inside.
template <class Visit>
FC_INLINE void visit_rows(const ConvGeometry& g, int64_t image, Range y, Visit visit) {
  if (y.begin >= y.end) return;
  const Range inside = interior(g.width, g.kernel_w, g.stride_w, g.dilation_w, g.pad_left, g.in_width);
  visit_block(g, image, inside, y, visit);
  for (int64_t x = 0; x < g.width; ++x)
    if (x == inside.begin && x < inside.end)
      x = inside.end - 1;
    else
      visit_block(g, image, {x, x + 1}, y, visit);
}

// Calls visit(run) for the runs that make up output rows [rows], counted over all instances.
template <class Visit>
FC_INLINE void for_each_run(const ConvGeometry& g, Range rows, Visit visit) {
  const Range inside = interior(g.height, g.kernel_h, g.stride_h, g.dilation_h, g.pad_top, g.in_height);
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t image = row / g.height, first = image * g.height;
    const Range y{row - first, std::min(rows.end - first, g.height)};
    for (int64_t edge = y.begin; edge < std::min(y.end, inside.begin); ++edge)
      visit_rows(g, image, {edge, edge + 1}, visit);
    visit_rows(g, image, intersect(y, inside), visit);
    for (int64_t edge = std::max(y.begin, inside.end); edge < y.end; ++edge)
      visit_rows(g, image, {edge, edge + 1}, visit);
    row = first + y.end;
  }
}
