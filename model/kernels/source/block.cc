// A decoder block as an XLA custom call. The cache is written in place.
#include "block.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "block_phases.h"
#include "instruction_sets.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace gemma {
namespace {

namespace ffi = xla::ffi;

ffi::Error wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("gemma_block: " + what);
}

// The weights of a block, one after another, as the call gets them. A norm of no numbers is one that
// the architecture lacks.
class Weights {
 public:
  explicit Weights(ffi::RemainingArgs arguments) : arguments_(arguments) {}

  // Null, and a reason, if it is neither of `width` numbers nor, where it may, of none.
  const float* norm(std::int64_t width, bool may_lack) {
    const auto found = arguments_.get<ffi::Buffer<ffi::F32>>(next_);
    ++next_;
    if (!found.has_value()) return complain("is no float32 norm");
    const Dimensions shape = found->dimensions();
    if (may_lack && is_shape(shape, {0})) return nullptr;
    if (!is_shape(shape, {width})) return complain("is a norm of shape " + shape_of(shape));
    return found->typed_data();
  }

  Matrix matrix(std::int64_t out_width, std::int64_t in_width) {
    const auto found = arguments_.get<ffi::AnyBuffer>(next_);
    ++next_;
    const bool is_known = found.has_value() && (found->element_type() == ffi::F32 ||
                                                found->element_type() == ffi::BF16);
    if (!is_known) {
      complain("is neither float32 nor bfloat16");
      return {};
    }
    const Dimensions shape = found->dimensions();
    if (!is_shape(shape, {out_width, in_width})) {
      complain("is a matrix of shape " + shape_of(shape));
      return {};
    }
    return {static_cast<const char*>(found->untyped_data()), found->element_type() == ffi::BF16,
            out_width, in_width};
  }

  std::int64_t outputs_of(std::size_t index) const {
    const auto found = arguments_.get<ffi::AnyBuffer>(index);
    return found.has_value() && found->dimensions().size() == 2 ? found->dimensions()[0] : 0;
  }

  const std::string& reason() const { return reason_; }

 private:
  const float* complain(const std::string& what) {
    if (reason_.empty()) reason_ = "weight " + std::to_string(next_ - 1) + " " + what + ".";
    return nullptr;
  }

  ffi::RemainingArgs arguments_;
  std::size_t next_ = 0;
  std::string reason_;
};

constexpr std::size_t kNumWeights = 13, kQuery = 1, kGate = 9;

BlockWeights take_weights(Weights& weights, const BlockShape& shape) {
  const std::int64_t width = shape.width, queries = shape.heads * shape.head_dim,
                     keys = shape.kv_heads * shape.head_dim;
  BlockWeights taken{};
  taken.pre_attention_norm = weights.norm(width, false);
  taken.query = weights.matrix(queries, width);
  taken.key = weights.matrix(keys, width);
  taken.value = weights.matrix(keys, width);
  taken.query_norm = weights.norm(shape.head_dim, true);
  taken.key_norm = weights.norm(shape.head_dim, true);
  taken.attention_output = weights.matrix(width, queries);
  taken.post_attention_norm = weights.norm(width, true);
  taken.pre_ffw_norm = weights.norm(width, false);
  taken.gate = weights.matrix(shape.feed_forward, width);
  taken.up = weights.matrix(shape.feed_forward, width);
  taken.down = weights.matrix(width, shape.feed_forward);
  taken.post_ffw_norm = weights.norm(width, true);
  return taken;
}

ffi::Error block(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> num_real,
                 ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> positions,
                 ffi::Buffer<ffi::S32> window_tokens, ffi::Buffer<ffi::F32> frequencies,
                 ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
                 ffi::RemainingArgs arguments, ffi::ResultBuffer<ffi::F32> y,
                 ffi::ResultBuffer<ffi::F32> new_keys, ffi::ResultBuffer<ffi::F32> new_values,
                 float epsilon, float query_scale, float logit_cap) {
  const Dimensions rows = x.dimensions(), cache = keys.dimensions();
  if (rows.size() != 2 || cache.size() != 4 || !is_same(rows, y->dimensions()) ||
      !is_same(cache, values.dimensions()) || !is_same(cache, new_keys->dimensions()) ||
      !is_same(cache, new_values->dimensions()) || !is_shape(slots.dimensions(), {rows[0]}) ||
      !is_shape(positions.dimensions(), {rows[0]}) || !is_shape(num_real.dimensions(), {}) ||
      !is_shape(window_tokens.dimensions(), {}) ||
      !is_shape(frequencies.dimensions(), {cache[3] / 2}) || cache[3] % 2 != 0 || cache[1] < 1 ||
      cache[2] < 1 || arguments.size() != kNumWeights) {
    return wrong("x is [rows, width] and the cache [slots, kv_heads, positions, head_dim], not " +
                 shape_of(rows) + " and " + shape_of(cache) + ", or another shape does not fit.");
  }
  if (keys.typed_data() != new_keys->typed_data() ||
      values.typed_data() != new_values->typed_data()) {
    return wrong("the cache must be written in place.");
  }
  const InstructionSet* set = instruction_set();
  if (set == nullptr) return ffi::Error::Internal(kNoInstructionSet);
  Weights given(arguments);
  const std::int64_t heads = given.outputs_of(kQuery) / std::max<std::int64_t>(cache[3], 1);
  if (heads % cache[1] != 0 || heads / cache[1] > kMaxHeads || heads == 0) {
    return wrong(std::to_string(heads) + " query heads cannot share " + std::to_string(cache[1]) +
                 " key heads.");
  }
  const BlockShape shape{rows[1], heads, cache[1], cache[3], given.outputs_of(kGate),
                         cache[0], cache[2]};
  const BlockWeights weights = take_weights(given, shape);
  if (!given.reason().empty()) return wrong(given.reason());
  const BlockTraits traits{frequencies.typed_data(), *window_tokens.typed_data(), epsilon,
                           query_scale, logit_cap};
  const std::int64_t count = std::clamp<std::int64_t>(*num_real.typed_data(), 0, rows[0]);
  std::fill(y->typed_data() + count * rows[1], y->typed_data() + rows[0] * rows[1], 0.0f);
  const BlockTokens tokens{count,
                           slots.typed_data(),
                           positions.typed_data(),
                           x.typed_data(),
                           y->typed_data(),
                           new_keys->typed_data(),
                           new_values->typed_data()};
  BlockPhases<ffi::ThreadPool>(pool, pool.num_threads(), *set, shape, weights, traits, tokens)
      .run();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmaBlock, gemma::block,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("query_scale")
                                  .Attr<float>("logit_cap"));
#pragma GCC visibility pop
