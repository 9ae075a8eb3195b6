// Depthwise convolution, one block of channels at a time.

static void conv_depthwise_f32(const DepthwiseConv& c, Range pixels) {
  const int64_t per_image = c.height * c.width;
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const int64_t image = p / per_image, rest = p % per_image;
    const float* origin = c.input + image * c.image_step + rest / c.width * c.row_step + rest % c.width * c.pixel_step;
    for (int64_t channel = 0; channel < c.pitch; channel += kLanes) {
      V sum = zero();
      for (int64_t t = 0; t < c.taps; ++t)
        sum = fma(load(origin + c.tap_offsets[t] + channel), load(c.weights + t * c.pitch + channel), sum);
      const int64_t offset = p * c.pitch + channel;
      store(c.output + offset, finish(sum, c.epilogue, offset, load(c.epilogue.bias + channel)));
    }
    finish_stored(c.epilogue, c.output, p * c.pitch, c.pitch, 1, c.pitch / kLanes);
  }
}
