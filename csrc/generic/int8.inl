// What all int8 kernels share, written once over the vector operations of isa/int8_*.cpp. F is a vector of floats, I of
// int32.

// ---- the epilogue ----

// `sum` counts from the channel's start.
FC_INLINE F scale_sum(I sum, F multiplier, F bias) { return add(exact(mul(to_float(sum), multiplier)), bias); }

FC_INLINE F load_residual(const Int8Epilogue& e, int64_t offset) {
  const F steps = sub(to_float(load_u8(e.residual + offset)), broadcast(e.residual_zero_point));
  return exact(mul(steps, broadcast(e.residual_scale)));
}

FC_INLINE F finish_sum(I sum, const Int8Epilogue& e, int64_t channel, int64_t offset) {
  F y = scale_sum(sum, load(e.multiplier + channel), load(e.bias + channel));
  if (e.residual) y = add(y, load_residual(e, offset));
  return clamp(y, broadcast(e.low), broadcast(e.high));
}

// Stores a vector of outputs at `offset`, whose first channel is `channel`.
FC_INLINE void store_output(I sum, const Int8Epilogue& e, void* output, int64_t channel, int64_t offset) {
  const F y = finish_sum(sum, e, channel, offset);
  if (e.to_bytes)
    store_u8(static_cast<uint8_t*>(output) + offset, add(round_to_i32(y), broadcast_i32(e.zero_point)));
  else
    store(static_cast<float*>(output) + offset, y);
}

// ---- output pixels ----

struct PixelPlace {
  int64_t image, y, x;
};
FC_INLINE PixelPlace place_of(int64_t pixel, const ConvGeometry& g) {
  const int64_t row = pixel / g.width;
  return {row / g.height, row % g.height, pixel % g.width};
}
FC_INLINE void step_pixel(PixelPlace& p, const ConvGeometry& g) {
  if (++p.x < g.width) return;
  p.x = 0;
  if (++p.y < g.height) return;
  p.y = 0;
  ++p.image;
}
