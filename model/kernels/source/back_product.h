// x = y · W for a few rows of y, the way back through a product, with one order of summation.
//
// A number of the result is a sum over the rows of W in blocks of 256. Within a block, rows are added
// in ascending order from zero, each with one fused multiply-add; blocks are added in ascending order:
//
//     x[i] = (fma(y[255], W[255][i], ... fma(y[0], W[0][i], 0)) + fma(y[511], ...)) + ...
//
// In blocks, because the head has as many rows as there are tokens, too many for one chain.
// So neither the number of rows, nor a row's place, nor the threads, nor the instruction set enters,
// as in product.h.
#pragma once

#include <cstdint>

namespace gemma {

// Rows of W in a block.
inline constexpr std::int64_t kDepth = 256;

// What one thread works on: some rows, and the places [begin, end) of the result.
template <typename Weight>
struct BackPart {
  const float* y;        // [rows, out_width]
  const Weight* weight;  // [out_width, in_width]
  float* x;              // [rows, in_width]
  std::int64_t rows;
  std::int64_t in_width;
  std::int64_t out_width;
  std::int64_t begin;
  std::int64_t end;
};

}  // namespace gemma
