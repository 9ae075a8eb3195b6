// The GEMM micro-kernel of every convolution: R rows of input, a constant step apart, times a panel of weights that is
// B vectors wide. `dot` adds the products of two vectors to a third: one in each lane, or in bf16 those of a pair. The
// R × B accumulators must stay in registers. GCC spills arrays that it unrolls late, so index sequences make every
// index a compile-time constant.

template <int R, int B>
struct Accumulators {
  V v[R * B];
};

template <int R, int B, size_t... I>
FC_INLINE void clear(Accumulators<R, B>& acc, std::index_sequence<I...>) {
  ((acc.v[I] = zero()), ...);
}

// One pointer serves three rows (p, p + step, p + 2 · step), because fourteen would not fit the registers.
template <int R>
struct InputRows {
  const float* first[(R + 2) / 3];
  int64_t step;
};

template <int R, size_t... I>
FC_INLINE InputRows<R> input_rows(const float* first, int64_t step, std::index_sequence<I...>) {
  return {{first + static_cast<int64_t>(3 * I) * step...}, step};
}

template <int R>
FC_INLINE InputRows<R> input_rows(const float* first, int64_t step) {
  return input_rows<R>(first, step, std::make_index_sequence<(R + 2) / 3>());
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
FC_INLINE void multiply_add(Accumulators<R, B>& acc, const InputRows<R>& rows, int64_t i, const V (&w)[B],
                            std::index_sequence<I...>) {
  ((acc.v[I] = dot(broadcast_terms<Terms>(rows.first[I / B / 3] + static_cast<int64_t>(I / B % 3) * rows.step + i),
                   w[I % B], acc.v[I])),
   ...);
}

template <size_t... I>
FC_INLINE void load_vectors(V (&v)[sizeof...(I)], const float* p, std::index_sequence<I...>) {
  ((v[I] = load(p + I * kLanes)), ...);
}

// acc[r][b] += rows[r][i] · weights[b], `Terms` at a time. Returns the end of the weights.
template <int Terms, int R, int B>
FC_INLINE const float* accumulate_term(Accumulators<R, B>& acc, const InputRows<R>& rows, int64_t i,
                                       const float* weights) {
  V w[B];
  load_vectors(w, weights, std::make_index_sequence<B>());
  multiply_add<Terms>(acc, rows, i, w, std::make_index_sequence<R * B>());
  return weights + B * kLanes;
}

// acc[r][b] += Σ_i rows[r][i] · weights[i][b], `Terms` at a time. Returns the end of the weights.
template <int Terms, int R, int B>
FC_INLINE const float* accumulate(Accumulators<R, B>& acc, const InputRows<R>& rows, int64_t depth,
                                  const float* weights) {
  FC_UNROLL(4)
  for (int64_t i = 0; i < depth; i += Terms) weights = accumulate_term<Terms>(acc, rows, i, weights);
  return weights;
}
