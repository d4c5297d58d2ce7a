// Decode attention as an XLA custom call: one token of each row over its slot of the cache.
#include "attention.h"

#include <cstdint>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "shared_work.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace gemma {
namespace {

namespace ffi = xla::ffi;

// Keys and values of less than this are read before another thread has woken up.
constexpr std::int64_t kSharedBytes = 256 * 1024;

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> keys,
                     ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::S32> slots,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> window_tokens,
                     ffi::ResultBuffer<ffi::F32> context, float logit_cap) {
  const auto q = query.dimensions(), k = keys.dimensions();
  const bool fits = q.size() == 3 && k.size() == 4 && q[2] == k[3] && k[1] > 0 && q[1] % k[1] == 0 &&
                    q[1] / k[1] <= kMaxHeads && k[2] > 0 && is_same(k, values.dimensions()) &&
                    is_same(q, context->dimensions()) && is_shape(slots.dimensions(), {q[0]}) &&
                    is_shape(positions.dimensions(), {q[0]}) &&
                    is_shape(window_tokens.dimensions(), {});
  if (!fits) {
    return ffi::Error::InvalidArgument(
        "gemma_attention takes query [rows, heads, head_dim], keys and values [slots, kv_heads, "
        "positions, head_dim], slots and positions [rows] and a window [], not " +
        shape_of(q) + ", " + shape_of(k) + " and others.");
  }
  const InstructionSet* set = instruction_set();
  if (set == nullptr) return ffi::Error::Internal(kNoInstructionSet);
  const std::int64_t num_rows = q[0], num_slots = k[0], kv_heads = k[1], num_positions = k[2],
                     head_dim = q[2], heads = q[1] / kv_heads;
  const std::int64_t window = *window_tokens.typed_data();
  const auto first_of = [&](std::int64_t position) {
    const std::int64_t first = position - window + 1;
    const std::int64_t oldest = position - num_positions + 1;
    const std::int64_t later = first > oldest ? first : oldest;
    return later > 0 ? later : 0;
  };
  std::int64_t bytes = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int64_t position = positions.typed_data()[row];
    if (position >= 0 && window > 0) bytes += (position - first_of(position) + 1) * kv_heads * head_dim * 8;
  }
  share_work(pool, bytes < kSharedBytes ? 1 : pool.num_threads(), num_rows * kv_heads,
             [&](std::int64_t piece) {
    const std::int64_t row = piece / kv_heads, kv_head = piece % kv_heads;
    const std::int64_t slot = slots.typed_data()[row], position = positions.typed_data()[row];
    float* result = context->typed_data() + piece * heads * head_dim;
    if (slot < 0 || slot >= num_slots || position < 0 || window < 1 || heads == 0) {
      for (std::int64_t i = 0; i < heads * head_dim; ++i) result[i] = 0.0f;
      return;
    }
    const std::int64_t first = first_of(position);
    thread_local std::vector<float> weights;
    weights.resize(static_cast<std::size_t>(heads * (position - first + 1)));
    const std::int64_t base = (slot * kv_heads + kv_head) * num_positions * head_dim;
    set->attend({query.typed_data() + piece * heads * head_dim, keys.typed_data() + base,
                 values.typed_data() + base, result, weights.data(), heads, head_dim,
                 num_positions, first, position, logit_cap});
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmaAttention, gemma::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("logit_cap"));
#pragma GCC visibility pop
