// The GEMM micro-kernel of every convolution: R ≤ mr rows of input times a panel of weights, B ≤ nr_blocks vectors
// wide. Its R × B accumulators must stay in registers. GCC spills arrays that it unrolls late, so index sequences make
// every index a compile-time constant.

template <int R, int B>
struct Accumulators {
  V v[R * B];
};

template <int R, int B, size_t... I>
FC_INLINE void clear(Accumulators<R, B>& acc, std::index_sequence<I...>) {
  ((acc.v[I] = zero()), ...);
}

// One term in every lane, or two terms in even and odd lanes.
template <int Terms>
FC_INLINE V broadcast_terms(const float* p) {
  if constexpr (Terms == 2)
    return broadcast_pair(p);
  else
    return broadcast(*p);
}

template <int Terms, int R, int B, size_t... I>
FC_INLINE void multiply_add(Accumulators<R, B>& acc, const float* const (&rows)[R], int64_t i, const V (&w)[B],
                            std::index_sequence<I...>) {
  ((acc.v[I] = fma(broadcast_terms<Terms>(rows[I / B] + i), w[I % B], acc.v[I])), ...);
}

template <int B, size_t... I>
FC_INLINE void load_weights(V (&w)[B], const float* weights, std::index_sequence<I...>) {
  ((w[I] = load(weights + I * kLanes)), ...);
}

// acc[r][b] += Σ_i rows[r][i] · weights[i][b], `Terms` at a time. Returns the end of the weights.
template <int Terms, int R, int B>
FC_INLINE const float* accumulate(Accumulators<R, B>& acc, const float* const (&rows)[R], int64_t depth,
                                  const float* weights) {
  FC_UNROLL(4)
  for (int64_t i = 0; i < depth; i += Terms, weights += B * kLanes) {
    V w[B];
    load_weights<B>(w, weights, std::make_index_sequence<B>());
    multiply_add<Terms>(acc, rows, i, w, std::make_index_sequence<R * B>());
  }
  return weights;
}

// rows[r] = first + r * step
template <size_t... I>
FC_INLINE void row_pointers(const float* (&rows)[sizeof...(I)], const float* first, int64_t step,
                            std::index_sequence<I...>) {
  ((rows[I] = first + static_cast<int64_t>(I) * step), ...);
}
