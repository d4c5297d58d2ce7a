// What a block does to one row between its products, written once for all instruction sets; included
// behind attend.h, whose exp_of it uses. Element by element but for one sum, so compilers may use
// what registers they like, also where the result takes the place of what it was made from.
#if defined(__clang__)
#define GEMMA_IN_ANY_ORDER _Pragma("clang loop vectorize(assume_safety)")
#else
#define GEMMA_IN_ANY_ORDER _Pragma("GCC ivdep")
#endif

// y = x / sqrt(mean(x²) + epsilon) · (1 + scale); the squares are summed as a product's numbers are.
inline void normalize(const float* x, const float* scale, std::int64_t width, float epsilon,
                      float* y) {
  Lanes squares = Lanes::zero();
  std::int64_t place = 0;
  for (; place + kLanes <= width; place += kLanes) {
    const Lanes values = Lanes::load(x + place);
    squares.add_product(values, values);
  }
  if (place < width) {
    const Lanes values = Lanes::load_first(x + place, static_cast<int>(width - place));
    squares.add_product(values, values);
  }
  float sums[kLanes];
  squares.store(sums);
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  const float share = 1.0f / std::sqrt(sums[0] / static_cast<float>(width) + epsilon);
  GEMMA_IN_ANY_ORDER
  for (std::int64_t i = 0; i < width; ++i) y[i] = x[i] * share * (1.0f + scale[i]);
}

// Each pair (x[i], x[i + half]) turned by the angle that has this sine and cosine, times factor.
inline void rotate(const float* x, const float* cosines, const float* sines, std::int64_t half,
                   float factor, float* y) {
  GEMMA_IN_ANY_ORDER
  for (std::int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    y[i] = (first * cosines[i] - second * sines[i]) * factor;
    y[i + half] = (second * cosines[i] + first * sines[i]) * factor;
  }
}

// y = gelu(x) · up, by the tanh approximation: with u = sqrt(2 / pi) · (x + 0.044715 x³),
// 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2u)).
inline void gate(const float* x, const float* up, std::int64_t count, float* y) {
  constexpr float kTwiceRoot = 1.59576912f;  // 2 · sqrt(2 / pi)
  GEMMA_IN_ANY_ORDER
  for (std::int64_t i = 0; i < count; ++i) {
    const float twice = kTwiceRoot * (x[i] + 0.044715f * (x[i] * x[i] * x[i]));
    const float small = exp_of(twice < 0.0f ? twice : -twice);
    const float share = (twice < 0.0f ? small : 1.0f) / (1.0f + small);
    y[i] = x[i] * share * up[i];
  }
}
