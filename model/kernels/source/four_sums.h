// The last two halvings on x86, four numbers at a time: four_of(lanes) has made the first two.
inline __m128 sums_of_two(__m128 a, __m128 b) {
  return _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
}

inline __m128 sums_of_four(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m128 ab = sums_of_two(a, b);  // a0+a2, b0+b2, a1+a3, b1+b3
  const __m128 cd = sums_of_two(c, d);
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

template <int Rows, int Outputs>
inline void store_sums(const Lanes (&sums)[Rows][Outputs], float* y, std::int64_t out_width) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    float* out = y + r * out_width;
    int o = 0;
#pragma GCC unroll 8
    for (; o + 4 <= Outputs; o += 4)
      _mm_storeu_ps(out + o, sums_of_four(four_of(sums[r][o]), four_of(sums[r][o + 1]),
                                          four_of(sums[r][o + 2]), four_of(sums[r][o + 3])));
    if constexpr (Outputs % 4 != 0) {
      constexpr int kLeft = Outputs % 4;
      const __m128 first = four_of(sums[r][Outputs - kLeft]);
      const __m128 second = kLeft > 1 ? four_of(sums[r][Outputs - kLeft + (kLeft > 1)]) : first;
      const __m128 third = kLeft > 2 ? four_of(sums[r][Outputs - kLeft + (kLeft > 2) * 2]) : first;
      const __m128 left = sums_of_four(first, second, third, first);
      if (kLeft == 1) {
        _mm_store_ss(out + o, left);
      } else {
        _mm_storel_pi(reinterpret_cast<__m64*>(out + o), left);
        if (kLeft == 3) _mm_store_ss(out + o + 2, _mm_movehl_ps(left, left));
      }
    }
  }
}
