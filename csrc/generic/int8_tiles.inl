// Products of bytes in registers: a tile is R rows of terms × B blocks of output channels.

template <int R, int B>
struct Int8Sums {
  I v[R * B];
};

// One pointer serves three rows, as in gemm.inl.
template <int R>
struct TermRows {
  const Term* first[(R + 2) / 3];
  int64_t step;
};
template <int R, size_t... J>
FC_INLINE TermRows<R> term_rows(const Term* first, int64_t step, std::index_sequence<J...>) {
  return {{first + static_cast<int64_t>(3 * J) * step...}, step};
}

template <size_t... J>
FC_INLINE void load_weights(I (&w)[sizeof...(J)], const Term* p, std::index_sequence<J...>) {
  ((w[J] = load_terms(p + J * kLanes * kGroup)), ...);
}
template <int R, int B, size_t... J>
FC_INLINE void clear_sums(Int8Sums<R, B>& sums, std::index_sequence<J...>) {
  ((sums.v[J] = zero_i32()), ...);
}
template <int R, int B, size_t... J>
FC_INLINE void multiply_terms(Int8Sums<R, B>& sums, const TermRows<R>& rows, int64_t i, const I (&w)[B],
                              std::index_sequence<J...>) {
  ((sums.v[J] = dot(sums.v[J], broadcast_terms(rows.first[J / B / 3] + static_cast<int64_t>(J / B % 3) * rows.step + i),
                    w[J % B])),
   ...);
}

// sums[r][b] += Σ_i terms[r][i] · weights[i][b] over a run. Returns the end of the weights.
template <int R, int B>
FC_INLINE const Term* add_run(Int8Sums<R, B>& sums, const Term* terms, int64_t step, int64_t count,
                              const Term* weights) {
  const TermRows<R> rows = term_rows<R>(terms, step, std::make_index_sequence<(R + 2) / 3>());
  for (int64_t i = 0; i < count; i += kGroup, weights += B * kLanes * kGroup) {
    I w[B];
    load_weights(w, weights, std::make_index_sequence<B>());
    multiply_terms<R, B>(sums, rows, i, w, std::make_index_sequence<R * B>());
  }
  return weights;
}

// `offsets` are those of the pixels in the output, or -1 for positions that have none.
template <int R, int B, size_t... J>
FC_INLINE void store_outputs(const Int8Sums<R, B>& sums, const Int8Epilogue& e, void* output, int64_t channel,
                             const int64_t* offsets, std::index_sequence<J...>) {
  const auto store_one = [&](I sum, int64_t block, int64_t offset) {
    if (offset < 0) return;
    const int64_t first = channel + block * kLanes;
    store_output(add(sum, load_i32(e.start + first)), e, output, first, offset + first);
  };
  (store_one(sums.v[J], static_cast<int64_t>(J % B), offsets[J / B]), ...);
}

// R positions of a strip × B blocks.
template <int R, int B>
FC_KERNEL void int8_tile(const Int8Conv& c, const Strip& strip, int64_t position, const Term* weights,
                         int64_t channel) {
  constexpr std::make_index_sequence<R * B> each;
  Int8Sums<R, B> sums;
  clear_sums<R, B>(sums, each);
  const Term* terms = strip.terms + position * c.position_terms;
  for (int64_t run = 0; run < c.run_count; ++run)
    weights = add_run<R, B>(sums, terms + c.runs[run], c.position_terms, c.run_terms, weights);
  const int64_t pitch = c.position_pitch();
  int64_t offsets[R];
  for (int64_t& offset : offsets) offset = -1;
  for_each_row(strip, position, position + R, [&](int64_t first, int64_t count, int64_t output) {
    for (int64_t i = 0; i < count; ++i) offsets[first + i] = (output + i) * pitch;
  });
  const Int8Epilogue e = c.epilogue;
  store_outputs<R, B>(sums, e, c.output, channel, offsets, each);
}

using Int8Tile = void (*)(const Int8Conv&, const Strip&, int64_t, const Term*, int64_t);

template <int B, size_t... R>
inline Int8Tile int8_tile_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr Int8Tile table[] = {int8_tile<R + 1, B>...};
  return table[rows - 1];
}

// The products of a convolution.
class VectorProducts {
 public:
  explicit VectorProducts(const Int8Conv& c) : c_(c) {}

  // One panel for the positions of a strip.
  template <int B>
  void multiply(const Strip& strip, int64_t block) const {
    const int64_t channel = block * kLanes;
    const Term* weights = static_cast<const Term*>(c_.weights) + channel * c_.depth();
    for (int64_t position = 0; position < strip.positions; position += kRows) {
      const int64_t left = strip.positions - position, rows = left < kRows ? left : kRows;
      int8_tile_of<B>(rows, std::make_index_sequence<kRows>())(c_, strip, position, weights, channel);
    }
  }

 private:
  const Int8Conv& c_;
};
