// Pooling over windows. A window is summed row by row, and the sums of rows are added up: so the rounding error of a
// global average does not grow with the area.

// A pooling window along one axis, clipped to the image, and the length that an average divides by.
struct Window {
  int64_t begin, end, length;
};

// Window `out` of `count` along an axis.
static Window pool_window(const PoolAxis& a, bool include_padding, int64_t out) {
  if (a.kernel == 0) {
    const int64_t begin = out * a.in / a.count, end = ((out + 1) * a.in + a.count - 1) / a.count;
    return {begin, end, end - begin};
  }
  const int64_t begin = out * a.stride - a.pad_before, end = std::min(begin + a.kernel, a.in + a.pad_after);
  const int64_t inside_begin = std::max<int64_t>(begin, 0), inside_end = std::min(end, a.in);
  return {inside_begin, inside_end, include_padding ? end - begin : inside_end - inside_begin};
}

template <bool Max>
FC_INLINE V pool_combine(V a, V b) {
  if constexpr (Max)
    return maximum(a, b);
  else
    return add(a, b);
}

template <int B, size_t... I>
FC_INLINE Accumulators<1, B> load_blocks(const float* p, std::index_sequence<I...>) {
  return {{load(p + I * kLanes)...}};
}

template <bool Max, int B, size_t... I>
FC_INLINE void pool_into(Accumulators<1, B>& acc, const Accumulators<1, B>& more, std::index_sequence<I...>) {
  ((acc.v[I] = pool_combine<Max>(acc.v[I], more.v[I])), ...);
}

template <int B, size_t... I>
FC_INLINE void store_scaled(const Accumulators<1, B>& acc, V scale, float* y, std::index_sequence<I...>) {
  (store(y + I * kLanes, mul(acc.v[I], scale)), ...);
}

template <bool Max, int B>
FC_INLINE Accumulators<1, B> pool_row(const float* row, int64_t columns, int64_t pitch) {
  constexpr std::make_index_sequence<B> each;
  Accumulators<1, B> acc = load_blocks<B>(row, each);
  for (int64_t x = 1; x < columns; ++x) pool_into<Max, B>(acc, load_blocks<B>(row + x * pitch, each), each);
  return acc;
}

// One window and B blocks of channels; `first` is the window's first pixel.
template <bool Max, int B>
FC_KERNEL void pool_blocks(const float* first, int64_t rows, int64_t columns, int64_t row_step, int64_t pitch,
                           float scale, float* y) {
  constexpr std::make_index_sequence<B> each;
  Accumulators<1, B> acc = pool_row<Max, B>(first, columns, pitch);
  for (int64_t r = 1; r < rows; ++r)
    pool_into<Max, B>(acc, pool_row<Max, B>(first + r * row_step, columns, pitch), each);
  store_scaled<B>(acc, broadcast(scale), y, each);
}

// Blocks that are pooled together: a cache line is read at once, and several sums hide the latency of additions.
constexpr int64_t kPoolBlocks = 4;

static void pool_f32(const Pool& c, Range pixels, Range blocks) {
  const auto wide = c.is_max ? pool_blocks<true, kPoolBlocks> : pool_blocks<false, kPoolBlocks>;
  const auto narrow = c.is_max ? pool_blocks<true, 1> : pool_blocks<false, 1>;
  const int64_t per_image = c.rows.count * c.columns.count, row_step = c.columns.in * c.pitch;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const int64_t image = p / per_image, rest = p % per_image;
    const Window rows = pool_window(c.rows, c.include_padding, rest / c.columns.count);
    const Window columns = pool_window(c.columns, c.include_padding, rest % c.columns.count);
    const float* first = c.input + image * c.rows.in * row_step + rows.begin * row_step + columns.begin * c.pitch;
    const float scale = c.is_max ? 1.f : 1.f / static_cast<float>(rows.length * columns.length);
    int64_t width;
    for (int64_t block = blocks.begin; block < blocks.end; block += width) {
      width = blocks.end - block >= kPoolBlocks ? kPoolBlocks : 1;
      (width > 1 ? wide : narrow)(first + block * kLanes, rows.end - rows.begin, columns.end - columns.begin, row_step,
                                  c.pitch, scale, c.output + p * c.pitch + block * kLanes);
    }
  }
}
