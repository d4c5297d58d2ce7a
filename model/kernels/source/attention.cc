// Decode attention as an XLA custom call: one token of each row over its slot of the cache.
#include "attention.h"

#include <algorithm>
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
  const bool fits = q.size() == 3 && k.size() == 4 && q[2] == k[3] && k[1] > 0 && k[2] > 0 &&
                    q[1] % k[1] == 0 && q[1] / k[1] <= kMaxHeads &&
                    is_same(k, values.dimensions()) && is_same(q, context->dimensions()) &&
                    is_shape(slots.dimensions(), {q[0]}) &&
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
  const auto slot_of = [&](std::int64_t row) -> std::int64_t { return slots.typed_data()[row]; };
  const auto last_of = [&](std::int64_t row) -> std::int64_t {
    return positions.typed_data()[row];
  };
  const auto first_of = [&](std::int64_t row) {
    const std::int64_t seen = window < num_positions ? window : num_positions;
    return last_of(row) >= seen ? last_of(row) - seen + 1 : 0;
  };
  const auto sees_something = [&](std::int64_t row) {
    const bool has_slot = slot_of(row) >= 0 && slot_of(row) < num_slots;
    return has_slot && last_of(row) >= 0 && window > 0 && heads > 0;
  };
  std::int64_t num_seen = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    if (sees_something(row)) num_seen += last_of(row) - first_of(row) + 1;
  }
  const std::int64_t bytes = num_seen * kv_heads * head_dim * 2 * std::int64_t{sizeof(float)};
  const std::int64_t threads = bytes < kSharedBytes ? 1 : pool.num_threads();
  share_work(pool, threads, num_rows * kv_heads, [&](std::int64_t piece) {
    const std::int64_t row = piece / kv_heads, kv_head = piece % kv_heads;
    const std::int64_t first_number = piece * heads * head_dim;
    float* result = context->typed_data() + first_number;
    if (!sees_something(row)) {
      std::fill(result, result + heads * head_dim, 0.0f);
      return;
    }
    thread_local std::vector<float> weights;
    weights.resize(static_cast<std::size_t>(heads * (last_of(row) - first_of(row) + 1)));
    const std::int64_t base = (slot_of(row) * kv_heads + kv_head) * num_positions * head_dim;
    set->attend({query.typed_data() + first_number, keys.typed_data() + base,
                 values.typed_data() + base, result, weights.data(), heads, head_dim,
                 num_positions, first_of(row), last_of(row), logit_cap});
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
