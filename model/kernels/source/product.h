// y = x · Wᵀ for a few rows of x, with one order of summation for each number of the result.
//
// A number of the result is a dot product of a row of x with a row of W. Sixteen partial sums, lane
// l of which adds the products at places l, l + 16, l + 32, ... in that order, each with one fused
// multiply-add; then lane l gains lane l + 8, the eight left are halved likewise, and so on to one:
//
//     places    0  1  2 ... 15 | 16 17 ... 31 | ...          lanes   0 .. 15
//     lanes     0  1  2 ... 15 |  0  1 ... 15 | ...            0..7 += 8..15
//                                                              0..3 += 4..7
//                                                              0..1 += 2..3
//                                                                 0 += 1
//
// Places beyond the end count as zero times zero. Neither the number of rows, nor a row's place, nor
// the number of threads, nor the instruction set enters that order: every processor with a fused
// multiply-add gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma {

inline constexpr std::int64_t kLanes = 16;

// An IEEE 754 binary32 without its lower half.
struct BFloat16 {
  std::uint16_t bits;
};

// Addresses from begin to end.
struct Memory {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};

// What one thread works on: the first `rows` rows, and the outputs [begin, end).
template <typename Weight>
struct Part {
  const float* x;        // [rows, in_width]
  const Weight* weight;  // [out_width, in_width]
  float* y;              // [rows, out_width]
  std::int64_t rows;
  std::int64_t in_width;
  std::int64_t out_width;
  std::int64_t begin;
  std::int64_t end;
  // What this thread reads next; asked for at the end, so that memory is not idle in between.
  Memory next = {};
};

}  // namespace gemma
