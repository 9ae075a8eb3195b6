// The epilogue of a convolution, in two parts. `finish` makes a vector of the output from a sum in a register; it knows
// clamps only. `finish_stored` then applies other functions in place, to a tile that has just been stored and is still
// in L1. So networks of clamps pay one test per tile, and functions have all registers to themselves.
//
// A kernel calls `finish` for every vector that it stores, and `finish_stored` for every tile or row of them, once.

// `offset` is the vector's place in the output.
FC_INLINE V finish(V sum, const Epilogue& e, int64_t offset, V bias) {
  V y = add(sum, bias);
  const V low = broadcast(e.activation.low), high = broadcast(e.activation.high);
  if (!e.residual) return clamp(y, low, high);
  const V residual = load(e.residual + offset);
  return e.residual_after_activation ? add(clamp(y, low, high), residual) : clamp(add(y, residual), low, high);
}

FC_KERNEL void add_residual(const float* residual, float* y, int64_t pitch, int64_t pixels, int64_t vectors) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = pixel * pitch + v * kLanes;
      store(y + at, add(load(y + at), load(residual + at)));
    }
}

// `vectors` vectors at each of `pixels` consecutive pixels of the output, from `offset`.
FC_INLINE void finish_stored(const Epilogue& e, float* output, int64_t offset, int64_t pitch, int64_t pixels,
                             int64_t vectors) {
  if (!e.activation.is_function()) return;
  apply_function(e.activation, output + offset, output + offset, pitch, pixels, vectors);
  if (e.residual_after_function)
    add_residual(e.residual_after_function + offset, output + offset, pitch, pixels, vectors);
}
