// The way back through a product as an XLA custom call: x [rows, in] = y [rows, out] · weight
// [out, in], for as many rows as are real; the rest of x is zeros.
#include "back_product.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "instruction_sets.h"
#include "shapes.h"
#include "shared_work.h"
#include "xla/ffi/api/ffi.h"

namespace gemma {
namespace {

namespace ffi = xla::ffi;

// Of a piece: what the registers of a tile hold, and rows enough to come back to the same weights.
constexpr std::int64_t kPieceColumns = 6 * kLanes;
constexpr std::int64_t kPieceRows = 64;

// Places of a piece, so that all threads get as many pieces.
std::int64_t columns_of_piece(std::int64_t width, std::int64_t threads) {
  const std::int64_t lanes = (width + kLanes - 1) / kLanes;
  const std::int64_t pieces = (width + kPieceColumns * threads - 1) / (kPieceColumns * threads);
  return (lanes + pieces * threads - 1) / (pieces * threads) * kLanes;
}

ffi::Error back_product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> y, ffi::AnyBuffer weight,
                        ffi::Buffer<ffi::S32> num_real, ffi::ResultBuffer<ffi::F32> x) {
  const auto y_shape = y.dimensions(), weight_shape = weight.dimensions(),
             x_shape = x->dimensions();
  const bool fits = y_shape.size() == 2 && weight_shape.size() == 2 && x_shape.size() == 2 &&
                    y_shape[1] == weight_shape[0] && x_shape[0] == y_shape[0] &&
                    x_shape[1] == weight_shape[1] && is_shape(num_real.dimensions(), {});
  if (!fits) {
    return ffi::Error::InvalidArgument(
        "gemma_back_product takes y [rows, out], weight [out, in], the number of rows [] and x "
        "[rows, in], not " +
        shape_of(y_shape) + ", " + shape_of(weight_shape) + ", " +
        shape_of(num_real.dimensions()) + " and " + shape_of(x_shape) + ".");
  }
  const InstructionSet* set = instruction_set();
  if (set == nullptr) return ffi::Error::Internal(kNoInstructionSet);
  const ffi::DataType dtype = weight.element_type();
  if (dtype != ffi::F32 && dtype != ffi::BF16) {
    return ffi::Error::InvalidArgument(
        "gemma_back_product: the weight must be float32 or bfloat16.");
  }
  const std::int64_t rows = std::clamp<std::int64_t>(*num_real.typed_data(), 0, y_shape[0]);
  const std::int64_t out_width = weight_shape[0], in_width = weight_shape[1];
  const float* values = y.typed_data();
  float* result = x->typed_data();
  const std::int64_t done = out_width == 0 ? 0 : rows;
  std::fill(result + done * in_width, result + x_shape[0] * in_width, 0.0f);
  if (done == 0 || in_width == 0) return ffi::Error::Success();
  const std::int64_t threads = std::max<std::int64_t>(pool.num_threads(), 1);
  const std::int64_t columns = columns_of_piece(in_width, threads);
  const std::int64_t across = (in_width + columns - 1) / columns;
  const std::int64_t down = (rows + kPieceRows - 1) / kPieceRows;
  share_work(pool, threads, across * down, [&](const Turn& turn) {
    const std::int64_t row = turn.piece % down * kPieceRows;
    const std::int64_t begin = turn.piece / down * columns;
    const std::int64_t count = std::min(kPieceRows, rows - row);
    const std::int64_t end = std::min(begin + columns, in_width);
    const float* own = values + row * out_width;
    float* to = result + row * in_width;
    if (dtype == ffi::BF16) {
      set->multiply_back_bfloat16({own, static_cast<const BFloat16*>(weight.untyped_data()), to,
                                   count, in_width, out_width, begin, end});
    } else {
      set->multiply_back_float32({own, static_cast<const float*>(weight.untyped_data()), to, count,
                                  in_width, out_width, begin, end});
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmaBackProduct, gemma::back_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
#pragma GCC visibility pop
