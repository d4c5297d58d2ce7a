// The product as an XLA custom call: y [rows, out] = x [rows, in] · weight [out, in]ᵀ, for as many
// rows as are real; the rest of y is zeros.
#include <algorithm>
#include <cstdint>
#include <string>

#include "instruction_sets.h"
#include "product.h"
#include "shapes.h"
#include "shared_work.h"
#include "xla/ffi/api/ffi.h"

namespace gemma {
namespace {

namespace ffi = xla::ffi;

// Of weight, in one piece: enough to be worth a thread's while. Tiles of most row counts divide it.
constexpr std::int64_t kPieceOutputs = 24;
constexpr std::int64_t kPieceBytes = 256 * 1024;
// Few enough outputs that no thread waits long for the last piece of another.
constexpr std::int64_t kPiecesOfThread = 8;

std::int64_t outputs_of_piece(std::int64_t out_width, std::int64_t row_bytes,
                              std::int64_t threads) {
  const std::int64_t that_fit = kPieceBytes / (row_bytes > 0 ? row_bytes : 1);
  const std::int64_t even = out_width / (threads * kPiecesOfThread);
  const std::int64_t outputs = (that_fit < even ? that_fit : even) / kPieceOutputs * kPieceOutputs;
  return outputs > kPieceOutputs ? outputs : kPieceOutputs;
}

template <typename Weight>
void multiply_in_pieces(ffi::ThreadPool& pool, Part<Weight> whole,
                        void (*multiply)(const Part<Weight>&)) {
  const std::int64_t threads = pool.num_threads();
  const std::int64_t outputs = outputs_of_piece(
      whole.out_width, whole.in_width * static_cast<std::int64_t>(sizeof(Weight)), threads);
  const std::int64_t pieces = (whole.out_width + outputs - 1) / outputs;
  share_work(pool, threads, pieces, [&](std::int64_t piece) {
    Part<Weight> part = whole;
    part.begin = piece * outputs;
    part.end = part.begin + outputs < whole.out_width ? part.begin + outputs : whole.out_width;
    multiply(part);
  });
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                   ffi::Buffer<ffi::S32> num_real, ffi::ResultBuffer<ffi::F32> y) {
  const auto x_shape = x.dimensions(), weight_shape = weight.dimensions(),
             y_shape = y->dimensions();
  const bool fits = x_shape.size() == 2 && weight_shape.size() == 2 && y_shape.size() == 2 &&
                    x_shape[1] == weight_shape[1] && y_shape[0] == x_shape[0] &&
                    y_shape[1] == weight_shape[0] && is_shape(num_real.dimensions(), {});
  if (!fits) {
    return ffi::Error::InvalidArgument(
        "gemma_product takes x [rows, in], weight [out, in], the number of rows [] and y [rows, "
        "out], not " +
        shape_of(x_shape) + ", " + shape_of(weight_shape) + ", " +
        shape_of(num_real.dimensions()) + " and " + shape_of(y_shape) + ".");
  }
  const InstructionSet* set = instruction_set();
  if (set == nullptr) return ffi::Error::Internal(kNoInstructionSet);
  const std::int64_t rows = std::clamp<std::int64_t>(*num_real.typed_data(), 0, x_shape[0]);
  const float* values = x.typed_data();
  float* result = y->typed_data();
  std::fill(result + rows * weight_shape[0], result + x_shape[0] * weight_shape[0], 0.0f);
  if (rows == 0 || weight_shape[0] == 0) return ffi::Error::Success();
  if (weight.element_type() == ffi::F32) {
    const auto* weights = reinterpret_cast<const float*>(weight.untyped_data());
    const Part<float> whole{values, weights, result, rows, x_shape[1], weight_shape[0], 0, 0};
    multiply_in_pieces(pool, whole, set->multiply_float32);
  } else if (weight.element_type() == ffi::BF16) {
    const auto* weights = reinterpret_cast<const BFloat16*>(weight.untyped_data());
    const Part<BFloat16> whole{values, weights, result, rows, x_shape[1], weight_shape[0], 0, 0};
    multiply_in_pieces(pool, whole, set->multiply_bfloat16);
  } else {
    return ffi::Error::InvalidArgument("gemma_product: the weight must be float32 or bfloat16.");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmaProduct, gemma::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
#pragma GCC visibility pop
