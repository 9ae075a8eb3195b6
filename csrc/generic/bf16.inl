// What the bf16 kernels have beside the direct convolution. An instruction set's file includes this after it.

static void round_bf16(const Bf16Rounding& c, Range pixels) {
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
    const float* x = c.input + pixel * c.in_pitch;
    float* y = c.output + pixel * c.pitch;
    for (int64_t i = 0; i < c.channels; i += kLanes) store_bf16(y + i / 2, load(x + i));
    if (c.channels % 2) {
      const uint16_t nothing = 0;
      std::memcpy(reinterpret_cast<char*>(y) + c.channels * sizeof nothing, &nothing, sizeof nothing);
    }
  }
}

static constexpr Bf16Kernels make_bf16_kernels() { return {kLanes, conv_direct, round_bf16}; }
