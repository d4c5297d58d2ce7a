// A weight matrix of either dtype, and its outputs in pieces that threads take.
#pragma once

#include <cstdint>

#include "instruction_sets.h"
#include "product.h"

namespace gemma {

// Of weight, in one piece: enough to be worth a thread's while. Tiles of most row counts divide it.
inline constexpr std::int64_t kPieceOutputs = 24;
inline constexpr std::int64_t kPieceBytes = 256 * 1024;
// Few enough outputs that no thread waits long for the last piece of another.
inline constexpr std::int64_t kPiecesOfThread = 8;
// What is asked for before a piece begins; the rest is asked for while it is worked on.
inline constexpr std::int64_t kFirstOutputs = 24;

struct Matrix {
  const char* data = nullptr;  // [out_width, in_width]
  bool is_bfloat16 = false;
  std::int64_t out_width = 0;
  std::int64_t in_width = 0;

  std::int64_t row_bytes() const {
    return in_width * static_cast<std::int64_t>(is_bfloat16 ? sizeof(BFloat16) : sizeof(float));
  }
  // Of the first few outputs from `begin` on.
  Memory first(std::int64_t begin) const {
    if (begin >= out_width) return {};
    const std::int64_t left = out_width - begin;
    const auto address = reinterpret_cast<std::uintptr_t>(data) +
                         static_cast<std::uintptr_t>(begin * row_bytes());
    return {address, address + static_cast<std::uintptr_t>(
                                   (left < kFirstOutputs ? left : kFirstOutputs) * row_bytes())};
  }
};

// Outputs of a piece where `out_width` of them, of `row_bytes` each, are shared out.
inline std::int64_t outputs_of_piece(std::int64_t out_width, std::int64_t row_bytes,
                                     std::int64_t threads) {
  const std::int64_t that_fit = kPieceBytes / (row_bytes > 0 ? row_bytes : 1);
  const std::int64_t even = out_width / (threads * kPiecesOfThread);
  const std::int64_t outputs = (that_fit < even ? that_fit : even) / kPieceOutputs * kPieceOutputs;
  return outputs > kPieceOutputs ? outputs : kPieceOutputs;
}

// y[r, o] for the first `rows` rows of x and the outputs [begin, end); y has rows of out_width.
inline void multiply(const InstructionSet& set, const Matrix& matrix, const float* x,
                     std::int64_t rows, float* y, std::int64_t begin, std::int64_t end,
                     Memory next) {
  if (matrix.is_bfloat16) {
    set.multiply_bfloat16({x, reinterpret_cast<const BFloat16*>(matrix.data), y, rows,
                           matrix.in_width, matrix.out_width, begin, end, next});
  } else {
    set.multiply_float32({x, reinterpret_cast<const float*>(matrix.data), y, rows,
                          matrix.in_width, matrix.out_width, begin, end, next});
  }
}

}  // namespace gemma
