// Low-rank additions, written once for all instruction sets; included behind tiles.h, whose product
// makes x · Aᵀ.

// `Width` times sixteen numbers of `Tokens` tokens, or the first `left` of sixteen.
template <int Tokens, int Width>
inline void add_sums(const LowRankPart& part, std::int64_t token, std::int64_t at, int left) {
  Lanes sums[Tokens][Width];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w) sums[t][w] = Lanes::zero();
  }
  const float* low = part.low + token * part.rank;
  for (std::int64_t rank = 0; rank < part.rank; ++rank) {
    const float* b = part.b + rank * part.out_width + at;
    Lanes loaded[Width];
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w)
      loaded[w] = left == kLanes ? Lanes::load(b + w * kLanes) : Lanes::load_first(b, left);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Lanes factor = Lanes::broadcast(low[t * part.rank + rank]);
#pragma GCC unroll 8
      for (int w = 0; w < Width; ++w) sums[t][w].add_product(factor, loaded[w]);
    }
  }
  const Lanes one = Lanes::broadcast(1.0f);
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    float* y = part.y + (token + t) * part.y_width + at;
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w) {
      // Once rounded, as 1 · sum is exact.
      Lanes total = left == kLanes ? Lanes::load(y + w * kLanes) : Lanes::load_first(y, left);
      total.add_product(one, sums[t][w]);
      if (left == kLanes)
        total.store(y + w * kLanes);
      else
        total.store_first(y, left);
    }
  }
}

template <int Tokens>
inline void add_sums_of(const LowRankPart& part, std::int64_t token) {
  // As many chains of additions as keep the processor busy.
  constexpr int kWidth = Tokens == 1 ? 4 : 2;
  std::int64_t at = 0;
  for (; at + kWidth * kLanes <= part.out_width; at += kWidth * kLanes)
    add_sums<Tokens, kWidth>(part, token, at, kLanes);
  for (; at < part.out_width; at += kLanes)
    add_sums<Tokens, 1>(part, token, at,
                        static_cast<int>(smaller(part.out_width - at, kLanes)));
}

inline void add_low_rank(const LowRankPart& part) {
  multiply(Part<float>{part.x, part.a, part.low, part.tokens, part.in_width, part.rank, 0,
                       part.rank});
  std::int64_t token = 0;
  for (; token + kTileRows <= part.tokens; token += kTileRows)
    add_sums_of<kTileRows>(part, token);
  for (; token < part.tokens; ++token) add_sums_of<1>(part, token);
}
