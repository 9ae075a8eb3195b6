// Products of bytes in AMX's tiles. A tile has 16 rows of 64 bytes. tdpbusd multiplies 16 pixels × 64 terms with 64
// terms × 16 output channels, four terms to a lane as in vpdpbusd.
//
// A block is M tiles of pixels × B tiles of channels. Its sums lie in tiles 0 to 3, terms in 4 and 5, weights in 6 and
// 7. Written as assembly, because intrinsics name tiles by literals only.

constexpr int64_t kTileRows = 16, kTileTerms = 64;

template <size_t Tile>
FC_INLINE void load_tile(const void* first, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(stride), "n"(Tile) : "memory");
}
template <size_t Tile>
FC_INLINE void store_tile(void* first, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(stride), "n"(Tile) : "memory");
}
template <size_t Sums, size_t Terms, size_t Weights>
FC_INLINE void multiply_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(Sums), "n"(Terms), "n"(Weights));
}

// Every tile has 16 rows of 64 bytes. Until its end, this thread's registers hold tiles.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette, start_row, unused[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Sums start where bytes that are all zero points end at zero: the same in every row.
template <int B, size_t... J>
FC_INLINE void start_sums(const int32_t* start, std::index_sequence<J...>) {
  (load_tile<J>(start + J % B * kLanes, 0), ...);
}
template <int B, size_t... J>
FC_INLINE void store_sums(int32_t* sums, std::index_sequence<J...>) {
  (store_tile<J>(sums + J / B * kTileRows * B * kLanes + J % B * kLanes, B * kTileTerms), ...);
}
template <size_t... J>
FC_INLINE void load_weights(const Term* weights, std::index_sequence<J...>) {
  (load_tile<6 + J>(weights + J * kTileTerms, sizeof...(J) * kTileTerms), ...);
}
template <int B, size_t M, size_t... J>
FC_INLINE void multiply_row(const Term* terms, int64_t step, std::index_sequence<J...>) {
  load_tile<4 + M % 2>(terms + static_cast<int64_t>(M) * kTileRows * step, step);
  (multiply_tiles<M * B + J, 4 + M % 2, 6 + J>(), ...);
}
template <int B, size_t... M>
FC_INLINE void multiply_rows(const Term* terms, int64_t step, std::index_sequence<M...>) {
  (multiply_row<B, M>(terms, step, std::make_index_sequence<B>()), ...);
}

// Four vectors of bytes after each other, from those of integers. What does not fit a byte becomes 0 or 255.
FC_INLINE I pack_bytes(I a, I b, I c, I d) {
  const I mixed = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), mixed);
}

enum class Output { bytes, bytes_with_residual, floats };

// Sums that wait in memory, [position][B blocks of channels].
struct WaitingBlock {
  Strip strip;
  int64_t begin, positions, channel;
};
constexpr WaitingBlock kNothing{{nullptr, 0, 0, 1, 1}, 0, 0, 0};

// Finishes the sums of a block, a few at a time, so that it can be done between other work.
template <int B, Output kOutput>
class BlockFinisher {
 public:
  static constexpr int64_t kPositions = 4 / B;  // at a time: four vectors

  FC_INLINE_METHOD BlockFinisher(const Int8Conv& c, const WaitingBlock& block, const int32_t* sums)
      : epilogue_(c.epilogue),
        output_(c.output),
        pitch_(c.position_pitch()),
        channel_(block.channel),
        width_(block.strip.width),
        padded_width_(block.strip.padded_width),
        multiplier_{load(epilogue_.multiplier + channel_), load(epilogue_.multiplier + channel_ + (B - 1) * kLanes)},
        bias_{load(epilogue_.bias + channel_), load(epilogue_.bias + channel_ + (B - 1) * kLanes)},
        sums_(sums),
        left_(block.positions),
        x_(block.begin % padded_width_) {
    const int64_t in_row = x_ < width_ ? x_ : width_;  // padding has no outputs
    offset_ = (block.strip.output + block.begin / padded_width_ * width_ + in_row) * pitch_ + channel_;
  }

  // About how often finish_some() has to be called.
  FC_INLINE_METHOD int64_t turns() const { return left_ / kPositions + 2; }
  FC_INLINE_METHOD bool is_done() const { return left_ <= 0; }

  // Up to kPositions positions of a row.
  FC_INLINE_METHOD void finish_some() {
    const int64_t in_row = width_ - x_ < left_ ? width_ - x_ : left_, count = in_row < kPositions ? in_row : kPositions;
    if (count > 0) {
      if constexpr (kOutput == Output::floats)
        store_floats(count);
      else
        store_bytes(pack_bytes(finish<0>(count), finish<1>(count), finish<2>(count), finish<3>(count)), count);
      skip(count);
      offset_ += count * pitch_;
    }
    if (x_ < width_) return;
    skip(padded_width_ - x_);
    x_ = 0;
  }

 private:
  const Int8Epilogue epilogue_;
  void* const output_;
  const int64_t pitch_, channel_, width_, padded_width_;
  const F multiplier_[2], bias_[2];
  const int32_t* sums_;
  int64_t left_, x_, offset_;

  FC_INLINE_METHOD void skip(int64_t count) {
    sums_ += count * B * kLanes;
    left_ -= count;
    x_ += count;
  }

  // The N-th vector as integers that fit bytes. Of positions behind the last, the residual of the first will do.
  template <int N>
  FC_INLINE_METHOD I finish(int64_t count) const {
    F y = scale_sum(load_i32(sums_ + N * kLanes), multiplier_[N % B], bias_[N % B]);
    if constexpr (kOutput == Output::bytes_with_residual)
      y = add(y, load_residual(epilogue_, offset_ + (N / B < count ? N / B : 0) * pitch_ + N % B * kLanes));
    return add(round_to_i32(clamp(y, broadcast(epilogue_.low), broadcast(epilogue_.high))),
               broadcast_i32(epilogue_.zero_point));
  }

  FC_INLINE_METHOD void store_bytes(I bytes, int64_t count) const {
    uint8_t* const to = static_cast<uint8_t*>(output_) + offset_;
    if constexpr (B == 2) {
      store_256(to, _mm512_castsi512_si256(bytes));
      if (count > 1) store_256(to + pitch_, _mm512_extracti64x4_epi64(bytes, 1));
    } else {
      store_128(to, _mm512_castsi512_si128(bytes));
      if (count > 1) store_128(to + pitch_, _mm512_extracti32x4_epi32(bytes, 1));
      if (count > 2) store_128(to + 2 * pitch_, _mm512_extracti32x4_epi32(bytes, 2));
      if (count > 3) store_128(to + 3 * pitch_, _mm512_extracti32x4_epi32(bytes, 3));
    }
  }

  FC_INLINE_METHOD void store_floats(int64_t count) const {
    for (int64_t i = 0; i < count * B; ++i)
      store_output(load_i32(sums_ + i * kLanes), epilogue_, output_, channel_ + i % B * kLanes,
                   offset_ + i / B * pitch_ + i % B * kLanes);
  }
};

// Adds up M · 16 positions × B · 16 channels in the tiles, and meanwhile finishes the block that waits: the processor
// does not find that work by itself, behind so many instructions of tiles. Then the new sums take its place.
template <int M, int B, Output kOutput>
FC_KERNEL void sum_block(const Int8Conv& c, const Term* terms, const Term* weights, int64_t channel,
                         const WaitingBlock& waiting, int32_t* sums) {
  constexpr std::make_index_sequence<M * B> each;
  BlockFinisher<B, kOutput> finisher(c, waiting, sums);
  const int64_t run_count = c.run_count, run_terms = c.run_terms, step = c.position_terms, *const runs = c.runs;
  const int64_t products = run_count * run_terms / kTileTerms, turns = (finisher.turns() + products - 1) / products;
  start_sums<B>(c.epilogue.start + channel, each);
  for (int64_t run = 0; run < run_count; ++run) {
    const Term* at = terms + runs[run];
    for (int64_t i = 0; i < run_terms; i += kTileTerms, weights += B * kTileTerms * kTileRows) {
      load_weights(weights, std::make_index_sequence<B>());
      multiply_rows<B>(at + i, step, std::make_index_sequence<M>());
      for (int64_t turn = 0; turn < turns && !finisher.is_done(); ++turn) finisher.finish_some();
    }
  }
  while (!finisher.is_done()) finisher.finish_some();
  store_sums<B>(sums, each);
}

// For a number of tiles of positions.
template <int B, Output kOutput, size_t... M>
inline auto sum_block_of(int64_t tiles, std::index_sequence<M...>) {
  static constexpr decltype(&sum_block<1, B, kOutput>) table[] = {sum_block<M + 1, B, kOutput>...};
  return table[tiles - 1];
}

// The products of a convolution. The last block waits until the next is added up, or until the end.
template <Output kOutput>
class TileProducts {
 public:
  explicit TileProducts(const Int8Conv& c) : c_(c) {}
  ~TileProducts() { finish_waiting(); }
  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;

  // One panel for the positions of a strip.
  template <int B>
  void multiply(const Strip& strip, int64_t panel_block) {
    constexpr int64_t kTiles = 4 / B, kPositions = kTiles * kTileRows;
    const int64_t channel = panel_block * kLanes;
    const Term* weights = static_cast<const Term*>(c_.weights) + channel * c_.depth();
    if (waiting_blocks_ != B) finish_waiting();
    waiting_blocks_ = B;
    for (int64_t position = 0; position < strip.positions; position += kPositions) {
      const int64_t left = strip.positions - position, count = left < kPositions ? left : kPositions;
      const auto sum =
          sum_block_of<B, kOutput>((count + kTileRows - 1) / kTileRows, std::make_index_sequence<kTiles>());
      sum(c_, strip.terms + position * c_.position_terms, weights, channel, waiting_, sums_);
      waiting_ = {strip, position, count, channel};
    }
  }

 private:
  const Int8Conv& c_;
  // Four vectors are read where the last positions of a block have fewer.
  alignas(64) int32_t sums_[(4 * kTileRows + 3) * kLanes];
  WaitingBlock waiting_ = kNothing;
  int waiting_blocks_ = 0;  // of channels

  template <int B>
  FC_INLINE_METHOD void finish_as() {
    BlockFinisher<B, kOutput> finisher(c_, waiting_, sums_);
    while (!finisher.is_done()) finisher.finish_some();
  }
  void finish_waiting() {
    if (waiting_blocks_ == 1) finish_as<1>();
    if (waiting_blocks_ == 2) finish_as<2>();
    waiting_ = kNothing;
  }
};
