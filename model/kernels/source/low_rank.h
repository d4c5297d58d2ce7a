// y += (x · Aᵀ) · B for tokens that share a pair of narrow matrices, with one order of summation for
// each number of the result.
//
// The numbers of x · Aᵀ, one for each rank, are dot products in the order of product.h. A number of
// the result then gains one sum over the ranks, in ascending order from zero, each with one fused
// multiply-add; and that sum is added to y with one rounding:
//
//     y[o] += fma(low[R-1], B[R-1][o], ... fma(low[1], B[1][o], fma(low[0], B[0][o], 0)))
//
// So neither the number of tokens, nor a token's place, nor the threads, nor the instruction set
// enters, as in product.h.
#pragma once

#include <cstdint>

namespace gemma {

// What one thread works on.
struct LowRankPart {
  const float* x;  // [tokens, in_width]
  const float* a;  // [rank, in_width]
  const float* b;  // [rank, out_width]
  float* y;        // [tokens, y_width], of which it adds to the first out_width
  float* low;      // room for [tokens, rank]
  std::int64_t tokens;
  std::int64_t rank;
  std::int64_t in_width;
  std::int64_t out_width;
  std::int64_t y_width;
};

}  // namespace gemma
