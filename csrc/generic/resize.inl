// Resampling of maps: a weighted sum over columns, then over rows.

static void resize_f32(const Resize& c, Range pixels) {
  const int64_t area = c.height * c.width;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const WeightedLine* rows = c.rows.lines + p % area / c.width * c.rows.taps;
    const WeightedLine* columns = c.columns.lines + p % c.width * c.columns.taps;
    const float* image = c.input + p / area * c.in_height * c.in_width * c.pitch;
    float* y = c.output + p * c.pitch;
    for (int64_t i = 0; i < c.pitch; i += kLanes) {
      V sum = broadcast(0.f);
      for (int64_t t = 0; t < c.rows.taps; ++t) {
        const float* row = image + rows[t].line * c.in_width * c.pitch + i;
        V along = mul(load(row + columns[0].line * c.pitch), broadcast(columns[0].weight));
        for (int64_t u = 1; u < c.columns.taps; ++u)
          along = fma(load(row + columns[u].line * c.pitch), broadcast(columns[u].weight), along);
        const V weight = broadcast(rows[t].weight);
        sum = t == 0 ? mul(along, weight) : fma(along, weight, sum);
      }
      store(y + i, sum);
    }
  }
}
