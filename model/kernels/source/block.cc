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

  // Pairs for a projection of `heads` times `out_width` outputs; the first says how many there are.
  PairBank pairs(BlockAdapters& adapters, std::int64_t heads, std::int64_t in_width,
                 std::int64_t out_width) {
    const auto a = arguments_.get<ffi::Buffer<ffi::F32>>(next_);
    const auto b = arguments_.get<ffi::Buffer<ffi::F32>>(next_ + 1);
    const auto ranks = arguments_.get<ffi::Buffer<ffi::S32>>(next_ + 2);
    next_ += 3;
    const bool is_known = a.has_value() && b.has_value() && ranks.has_value() &&
                          a->dimensions().size() == 4;
    if (!is_known) {
      complain("is no bank of pairs");
      return {};
    }
    const std::int64_t num_pairs = a->dimensions()[0], rank = a->dimensions()[2];
    if (adapters.num_pairs == 0) {
      adapters.num_pairs = num_pairs;
      adapters.most_rank = rank;
    }
    if (num_pairs != adapters.num_pairs || rank != adapters.most_rank ||
        !is_shape(a->dimensions(), {num_pairs, heads, rank, in_width}) ||
        !is_shape(b->dimensions(), {num_pairs, heads, rank, out_width}) ||
        !is_shape(ranks->dimensions(), {num_pairs})) {
      complain("is a bank of shapes " + shape_of(a->dimensions()) + " and " +
               shape_of(b->dimensions()));
      return {};
    }
    return {a->typed_data(), b->typed_data(), ranks->typed_data(), heads, in_width, out_width};
  }

  const std::int32_t* adapter_slots(std::int64_t tokens) {
    const auto found = arguments_.get<ffi::Buffer<ffi::S32>>(next_);
    ++next_;
    if (found.has_value() && is_shape(found->dimensions(), {tokens})) return found->typed_data();
    complain("are no adapter slots of the tokens");
    return nullptr;
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

constexpr std::size_t kNumWeights = 13, kNumWithAdapters = 13 + 1 + 7 * 3, kQuery = 1, kGate = 9;

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

BlockAdapters take_adapters(Weights& weights, const BlockShape& shape, std::int64_t tokens) {
  const std::int64_t width = shape.width, head_dim = shape.head_dim;
  BlockAdapters taken{};
  taken.slots = weights.adapter_slots(tokens);
  taken.query = weights.pairs(taken, shape.heads, width, head_dim);
  taken.key = weights.pairs(taken, shape.kv_heads, width, head_dim);
  taken.value = weights.pairs(taken, shape.kv_heads, width, head_dim);
  taken.attention_output = weights.pairs(taken, 1, shape.heads * head_dim, width);
  taken.gate = weights.pairs(taken, 1, width, shape.feed_forward);
  taken.up = weights.pairs(taken, 1, width, shape.feed_forward);
  taken.down = weights.pairs(taken, 1, shape.feed_forward, width);
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
      cache[2] < 1 ||
      (arguments.size() != kNumWeights && arguments.size() != kNumWithAdapters)) {
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
  const BlockAdapters adapters = arguments.size() == kNumWeights
                                     ? BlockAdapters{}
                                     : take_adapters(given, shape, rows[0]);
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
  BlockPhases<ffi::ThreadPool>(pool, pool.num_threads(), *set, shape, weights, adapters, traits,
                               tokens)
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
