// Attention, written once for all instruction sets; included behind tiles.h, whose product makes
// the logits. Lanes also has broadcast(value), store(p), store_first(p, count) and times(value).

// exp(x) for x <= 0, to 2 units in the last place: 2^n · exp(r) with |r| <= ln(2) / 2, and the
// series of exp(r) to the seventh power. Below -87 it stays at exp(-87); NaN stays NaN.
inline float exp_of(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  // Adding it leaves a whole number in the lowest bits.
  constexpr float kShift = 12582912.0f;
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = __builtin_fmaf(bounded, kLog2E, kShift);
  const float n = shifted - kShift;
  const float r = __builtin_fmaf(n, -kLn2Low, __builtin_fmaf(n, -kLn2High, bounded));
  float series = 1.0f / 5040;
  series = __builtin_fmaf(series, r, 1.0f / 720);
  series = __builtin_fmaf(series, r, 1.0f / 120);
  series = __builtin_fmaf(series, r, 1.0f / 24);
  series = __builtin_fmaf(series, r, 1.0f / 6);
  series = __builtin_fmaf(series, r, 0.5f);
  series = __builtin_fmaf(series, r, 1.0f);
  series = __builtin_fmaf(series, r, 1.0f);
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return series * power;
}

// Turns the logits of one head into weights; returns their sum.
inline float weigh(float* logits, std::int64_t count, float cap) {
  if (cap != 0.0f) {
    for (std::int64_t i = 0; i < count; ++i) logits[i] = std::tanh(logits[i] / cap) * cap;
  }
  float largest = logits[0];
  for (std::int64_t i = 1; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
  for (std::int64_t i = 0; i < count; ++i) logits[i] = exp_of(logits[i] - largest);
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += logits[i + lane];
  }
  for (std::int64_t lane = 0; i + lane < count; ++lane) sums[lane] += logits[i + lane];
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// context[h, at ...] = sum over keys of weights[h, key] · values[key, at ...] / total[h]; `Width`
// times sixteen numbers of `Heads` heads, or the first `left` of sixteen.
template <int Heads, int Width>
inline void add_values(const AttentionPart& part, std::int64_t head, std::int64_t at, int left,
                       const float* totals) {
  const std::int64_t count = part.last - part.first + 1;
  Lanes sums[Heads][Width];
#pragma GCC unroll 8
  for (int h = 0; h < Heads; ++h) {
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w) sums[h][w] = Lanes::zero();
  }
  const float* weights = part.weights + head * count;
  std::int64_t place = part.first % part.num_positions;
  for (std::int64_t key = 0; key < count; ++key) {
    const float* value = part.values + place * part.head_dim + at;
    place = place + 1 == part.num_positions ? 0 : place + 1;
    Lanes loaded[Width];
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w)
      loaded[w] = left == kLanes ? Lanes::load(value + w * kLanes) : Lanes::load_first(value, left);
#pragma GCC unroll 8
    for (int h = 0; h < Heads; ++h) {
      const Lanes weight = Lanes::broadcast(weights[h * count + key]);
#pragma GCC unroll 8
      for (int w = 0; w < Width; ++w) sums[h][w].add_product(weight, loaded[w]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < Heads; ++h) {
    float* context = part.context + (head + h) * part.head_dim + at;
    const float share = 1.0f / totals[head + h];
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w) {
      const Lanes mean = sums[h][w].times(share);
      if (left == kLanes)
        mean.store(context + w * kLanes);
      else
        mean.store_first(context, left);
    }
  }
}

template <int Heads>
inline void add_values_of(const AttentionPart& part, std::int64_t head, const float* totals) {
  constexpr int kWidth = kTileRows;
  std::int64_t at = 0;
  for (; at + kWidth * kLanes <= part.head_dim; at += kWidth * kLanes)
    add_values<Heads, kWidth>(part, head, at, kLanes, totals);
  for (; at < part.head_dim; at += kLanes)
    add_values<Heads, 1>(part, head, at, static_cast<int>(smaller(part.head_dim - at, kLanes)),
                         totals);
}

inline void attend(const AttentionPart& part) {
  const std::int64_t count = part.last - part.first + 1;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t place = (part.first + done) % part.num_positions;
    const std::int64_t run = smaller(count - done, part.num_positions - place);
    multiply(Part<float>{part.query, part.keys + place * part.head_dim, part.weights + done,
                         part.heads, part.head_dim, count, 0, run});
    done += run;
  }
  float totals[kMaxHeads];
  for (std::int64_t head = 0; head < part.heads; ++head)
    totals[head] = weigh(part.weights + head * count, count, part.logit_cap);
  std::int64_t head = 0;
  for (; head + kTileRows <= part.heads; head += kTileRows)
    add_values_of<kTileRows>(part, head, totals);
  for (; head < part.heads; ++head) add_values_of<1>(part, head, totals);
}
