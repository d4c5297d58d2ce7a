// The product as an XLA custom call: y [rows, out] = x [rows, in] · weight [out, in]ᵀ, for as many
// rows as are real; the rest of y is zeros.
#include <algorithm>
#include <cstdint>
#include <string>

#include "instruction_sets.h"
#include "matrix.h"
#include "shapes.h"
#include "shared_work.h"
#include "xla/ffi/api/ffi.h"

namespace gemma {
namespace {

namespace ffi = xla::ffi;

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
  const ffi::DataType dtype = weight.element_type();
  if (dtype != ffi::F32 && dtype != ffi::BF16) {
    return ffi::Error::InvalidArgument("gemma_product: the weight must be float32 or bfloat16.");
  }
  const Matrix matrix{static_cast<const char*>(weight.untyped_data()), dtype == ffi::BF16,
                      weight_shape[0], x_shape[1]};
  const std::int64_t threads = pool.num_threads();
  const std::int64_t outputs = outputs_of_piece(matrix.out_width, matrix.row_bytes(), threads);
  const std::int64_t pieces = (matrix.out_width + outputs - 1) / outputs;
  share_work(pool, threads, pieces, [&](const Turn& turn) {
    const std::int64_t begin = turn.piece * outputs;
    const Memory next = turn.following < 0 ? Memory{} : matrix.first(turn.following * outputs);
    multiply(*set, matrix, values, rows, result, begin,
             std::min(begin + outputs, matrix.out_width), next);
  });
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
