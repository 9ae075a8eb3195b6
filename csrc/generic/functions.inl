// Elementwise functions of vectors, within a few units in the last place of float32, NaN and infinities included. They
// return what torch returns: silu(−∞) = −∞ · 0 is NaN.

// Adding kRound rounds to an integer, which the low bits then hold, with the bias of an exponent.
constexpr float kRound = 12582912.f + 127.f;  // 1.5 · 2²³ + 127

// 2^n is 0 at kExpLow and infinite at kExpHigh. So what float32 holds as a subnormal number becomes 0, and what exceeds
// e^88.37 infinite, a little early.
constexpr float kExpLow = -88.f, kExpHigh = 89.f;

// x − n · ln 2. With fused multiply-adds, one product with ln 2 is exact enough. Without them, ln 2 comes in two parts;
// the first has so few bits that its products with n are exact.
FC_INLINE V subtract_ln2(V x, V n) {
  if constexpr (kFusedMultiplyAdd)
    return fma(n, broadcast(-0.693147181f), x);
  else
    return fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
}

// 2^n and r of e^x = 2^n · e^r.
struct Exponential {
  V scale, r;
};
FC_INLINE Exponential split_exponential(V x) {
  x = clamp(x, broadcast(kExpLow), broadcast(kExpHigh));
  const V rounded = fma(x, broadcast(1.44269504f), broadcast(kRound));
  return {low_bits_to_exponent(rounded), subtract_ln2(x, sub(rounded, broadcast(kRound)))};
}

// e^r or, where Sign is −1, e^−r: a minimax polynomial with an error of 1e-7.
template <int Sign>
FC_INLINE V short_exp(V r) {
  V q = fma(broadcast(Sign * 0.008312494494f), r, broadcast(0.041890397668f));
  q = fma(q, r, broadcast(Sign * 0.166671156883f));
  q = fma(q, r, broadcast(0.499992311001f));
  q = fma(q, r, broadcast(Sign));
  return fma(q, r, broadcast(1.f));
}

// (e^r − 1) / r, minimax with an error of 3e-9.
FC_INLINE V exp_slope(V r) {
  V q = fma(broadcast(0.00138145173f), r, broadcast(0.00836875569f));
  q = fma(q, r, broadcast(0.0416683927f));
  q = fma(q, r, broadcast(0.166665196f));
  q = fma(q, r, broadcast(0.49999994f));
  return fma(q, r, broadcast(1.f));
}

FC_INLINE V exp_flushed(V x) {
  const Exponential e = split_exponential(x);
  return mul(e.scale, short_exp<1>(e.r));
}

// 1 + e^−x. The signs are in the constants, because gates of every kind call this for every element.
FC_INLINE V one_plus_exp_minus(V x) {
  x = clamp(x, broadcast(-kExpHigh), broadcast(-kExpLow));
  const V rounded = fma(x, broadcast(-1.44269504f), broadcast(kRound)), n = sub(broadcast(kRound), rounded);
  return fma(low_bits_to_exponent(rounded), short_exp<-1>(subtract_ln2(x, n)), broadcast(1.f));
}

// e^x − 1, without cancellation near 0.
FC_INLINE V exp_minus_1(V x) {
  const Exponential e = split_exponential(x);
  return fma(mul(e.r, exp_slope(e.r)), e.scale, sub(e.scale, broadcast(1.f)));
}

// e^x over the whole range of float32: the power of two is applied in two halves.
FC_INLINE V exp_full(V x) {
  x = clamp(x, broadcast(-104.f), broadcast(kExpHigh));
  const V round = broadcast(kRound), n = sub(fma(x, broadcast(1.44269504f), round), round), r = subtract_ln2(x, n);
  const V rounded_half = fma(n, broadcast(0.5f), round), half = sub(rounded_half, round);
  const V y = mul(fma(r, exp_slope(r), broadcast(1.f)), low_bits_to_exponent(rounded_half));
  return mul(y, low_bits_to_exponent(add(sub(n, half), round)));
}

// x · Φ(x). The tail Φ(−|x|) = e^(−x²/2) · t · P(t) with t = 1 / (1 + 0.3 |x|), P minimax, error 2e-7 of the tail.
FC_INLINE V gelu(V x) {
  const V t = div(broadcast(1.f), fma(absolute(x), broadcast(0.3f), broadcast(1.f)));
  V p = fma(broadcast(0.0354236611f), t, broadcast(-0.15615814f));
  p = fma(p, t, broadcast(0.204556259f));
  p = fma(p, t, broadcast(-0.0520335395f));
  p = fma(p, t, broadcast(0.127691524f));
  p = fma(p, t, broadcast(0.100176022f));
  p = fma(p, t, broadcast(0.120712125f));
  p = fma(p, t, broadcast(0.119632008f));
  const V tail = mul(mul(p, t), exp_flushed(mul(mul(x, x), broadcast(-0.5f))));
  const V low = broadcast(-std::numeric_limits<float>::infinity());
  const V y = mul(clamp(x, low, broadcast(20.f)), tail);  // ∞ · 0 would be NaN
  return select_positive(x, sub(x, y), y);
}

// x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 = x · sigmoid(2 √(2/π) (x + 0.044715 x³))
FC_INLINE V gelu_tanh(V x) {
  const V u = mul(x, fma(mul(x, x), broadcast(0.0713548162f), broadcast(1.59576912f)));
  return div(x, one_plus_exp_minus(u));
}

// x · tanh(ln(1 + e^x)) = x · n / (n + 2) with n = e^2x + 2 e^x; the ratio is 1 in float32 where x > 20.
FC_INLINE V mish(V x) {
  const V low = broadcast(-std::numeric_limits<float>::infinity());
  const V e = exp_flushed(clamp(x, low, broadcast(20.f))), n = mul(e, add(e, broadcast(2.f)));
  return mul(x, div(n, add(n, broadcast(2.f))));
}

// (e^2x − 1) / (e^2x + 1); ±1 in float32 where |x| > 10.
FC_INLINE V hyperbolic_tangent(V x) {
  const V e = exp_minus_1(clamp(add(x, x), broadcast(-20.f), broadcast(20.f)));
  return div(e, add(e, broadcast(2.f)));
}

FC_INLINE V clamp_0_6(V x) { return clamp(add(x, broadcast(3.f)), zero(), broadcast(6.f)); }

template <Function F>
FC_INLINE V apply_function(V x, V parameter) {
  if constexpr (F == Function::leaky_relu) return select_positive(x, x, mul(x, parameter));
  if constexpr (F == Function::elu) return select_positive(x, x, mul(parameter, exp_minus_1(x)));
  if constexpr (F == Function::sigmoid) return div(broadcast(1.f), one_plus_exp_minus(x));
  if constexpr (F == Function::hard_sigmoid) return mul(clamp_0_6(x), broadcast(1.f / 6));
  if constexpr (F == Function::silu) return div(x, one_plus_exp_minus(x));
  if constexpr (F == Function::hard_swish) return mul(mul(x, broadcast(1.f / 6)), clamp_0_6(x));
  if constexpr (F == Function::gelu) return gelu(x);
  if constexpr (F == Function::gelu_tanh) return gelu_tanh(x);
  if constexpr (F == Function::mish) return mish(x);
  if constexpr (F == Function::tanh) return hyperbolic_tangent(x);
  if constexpr (F == Function::exp) return exp_full(x);
  if constexpr (F == Function::sqrt) return square_root(x);
  if constexpr (F == Function::reciprocal) return div(broadcast(1.f), x);
  return x;
}

// to = F(from) for `vectors` vectors at each of `pixels` pixels, which may be the same place.
template <Function F>
FC_KERNEL void apply_to_pixels(const float* from, float* to, float parameter, int64_t pitch, int64_t pixels,
                               int64_t vectors) {
  const V p = broadcast(parameter);
  if (pitch == vectors * kLanes) {
    vectors *= pixels;
    pixels = 1;
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = pixel * pitch + v * kLanes;
      store(to + at, apply_function<F>(load(from + at), p));
    }
}

using ApplyToPixels = void (*)(const float*, float*, float, int64_t, int64_t, int64_t);

template <size_t... F>
inline ApplyToPixels apply_to_pixels_of(Function f, std::index_sequence<F...>) {
  static constexpr ApplyToPixels table[] = {apply_to_pixels<static_cast<Function>(F)>...};
  return table[static_cast<size_t>(f)];
}

static void apply_function(const Activation& a, const float* from, float* to, int64_t pitch, int64_t pixels,
                           int64_t vectors) {
  constexpr std::make_index_sequence<static_cast<size_t>(Function::count)> functions;
  apply_to_pixels_of(a.function, functions)(from, to, a.parameter, pitch, pixels, vectors);
}
