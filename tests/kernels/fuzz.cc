// Random shapes through every instruction set of this processor, compared with plain C++ to the bit.
//
//     fuzz SHAPES SEED           compares them
//     fuzz beyond SET LAYOUT     reads one number too far, which must end it
//
// Built with sanitizers. They see what the compiler reads, and not what a masked load does; so half
// the buffers end where a block of malloc ends, and half where a page begins that none may touch.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "block_phases.h"
#include "buffers.h"
#include "instruction_sets.h"

namespace {

using gemma::AttentionPart;
using gemma::BackPart;
using gemma::BFloat16;
using gemma::Buffer;
using gemma::InstructionSet;
using gemma::Matrix;
using gemma::LowRankPart;
using gemma::Part;
using gemma::untouchable;

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet* set : {&gemma::kAvx512, &gemma::kAvx2, &gemma::kNeon}) {
    if (set->is_available()) sets.push_back(set);
  }
  return sets;
}

class Fuzz {
 public:
  explicit Fuzz(std::uint64_t seed) : random_(seed) {
    for (char*& page : pages_) page = untouchable();
  }

  // One product of each kind of weight there and back, one attention, one row and one low-rank addition, and now and
  // then a block.
  bool agrees() {
    use_pages_ = up_to(1) == 1;
    return product_agrees<float>() && product_agrees<BFloat16>() && back_agrees<float>() &&
           back_agrees<BFloat16>() && attention_agrees() && rows_agree() && low_rank_agrees() && (up_to(9) != 0 || block_agrees());
  }

 private:
  std::int64_t up_to(std::int64_t most) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(most + 1));
  }

  // Small ones, large ones, zeros of both signs and, now and then, below the normal numbers.
  float number() {
    const float unit = static_cast<float>(up_to(2000000) - 1000000) * 1e-6f;
    const std::int64_t kind = up_to(63);
    return kind == 0 ? 0.0f : kind == 1 ? -0.0f : kind == 2 ? unit * 1e-39f : kind == 3 ? unit * 1e6f : unit;
  }

  void fill(float* begin, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) begin[i] = number();
  }

  void fill(BFloat16* begin, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = number();
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      begin[i].bits = static_cast<std::uint16_t>(bits >> 16);
    }
  }

  template <typename Number>
  Buffer buffer(std::int64_t count, int place) {
    const std::int64_t size = sizeof(Number);
    return Buffer(count * size, up_to(17) * size, use_pages_ ? pages_[place] : nullptr);
  }

  template <typename Weight>
  bool product_agrees() {
    const std::int64_t rows = 1 + up_to(31), in_width = up_to(200), out_width = 1 + up_to(40);
    const std::int64_t begin = up_to(out_width), end = begin + up_to(out_width - begin);
    const Buffer x = buffer<float>(rows * in_width, 0);
    const Buffer weight = buffer<Weight>(out_width * in_width, 1);
    fill(x.of<float>(), rows * in_width);
    fill(weight.of<Weight>(), out_width * in_width);
    // What is no output of the part must stay as it is.
    const Buffer expected = buffer<float>(rows * out_width, 2);
    multiply(gemma::kPlain, {x.of<float>(), weight.of<Weight>(), expected.of<float>(), rows,
                             in_width, out_width, begin, end});
    for (const InstructionSet* set : available()) {
      const Buffer y = buffer<float>(rows * out_width, 3);
      multiply(*set, Part<Weight>{x.of<float>(), weight.of<Weight>(), y.of<float>(), rows, in_width,
                                  out_width, begin, end});
      if (!is_equal(expected, y, rows * out_width)) {
        std::printf("%s: %d bytes a weight, %ld rows, in %ld, out %ld, part %ld to %ld\n", set->name,
                    int{sizeof(Weight)}, long(rows), long(in_width), long(out_width), long(begin),
                    long(end));
        return false;
      }
    }
    return true;
  }

  bool attention_agrees() {
    const std::int64_t heads = 1 + up_to(up_to(3) == 0 ? 31 : 5), head_dim = up_to(150);
    const std::int64_t num_positions = 1 + up_to(60), last = up_to(4 * num_positions);
    const std::int64_t most = last + 1 < num_positions ? last + 1 : num_positions;
    const std::int64_t count = 1 + up_to(most - 1);
    const float cap = up_to(2) == 0 ? 2.0f : 0.0f;
    const Buffer query = buffer<float>(heads * head_dim, 0);
    const Buffer keys = buffer<float>(num_positions * head_dim, 1);
    const Buffer values = buffer<float>(num_positions * head_dim, 2);
    fill(query.of<float>(), heads * head_dim);
    fill(keys.of<float>(), num_positions * head_dim);
    fill(values.of<float>(), num_positions * head_dim);
    const Buffer expected = buffer<float>(heads * head_dim, 3);
    const auto attend = [&](const InstructionSet& set, const Buffer& context) {
      const Buffer weights = buffer<float>(heads * count, 4);
      set.attend(AttentionPart{query.of<float>(), keys.of<float>(), values.of<float>(),
                               context.of<float>(), weights.of<float>(), heads, head_dim,
                               num_positions, last - count + 1, last, cap});
    };
    attend(gemma::kPlain, expected);
    for (const InstructionSet* set : available()) {
      const Buffer context = buffer<float>(heads * head_dim, 5);
      attend(*set, context);
      if (!is_equal(expected, context, heads * head_dim)) {
        std::printf("%s: attention, %ld heads of %ld, %ld positions, %ld keys to %ld, cap %g\n",
                    set->name, long(heads), long(head_dim), long(num_positions), long(count),
                    long(last), double(cap));
        return false;
      }
    }
    return true;
  }

  bool rows_agree() {
    const std::int64_t half = up_to(100), width = 2 * half + up_to(1);
    const Buffer x = buffer<float>(width, 0), scale = buffer<float>(width, 1);
    fill(x.of<float>(), width);
    fill(scale.of<float>(), width);
    const auto make = [&](const InstructionSet& set, const Buffer& y, int which) {
      if (which == 0) set.normalize(x.of<float>(), scale.of<float>(), width, 1e-6f, y.of<float>());
      if (which == 1) set.gate(x.of<float>(), scale.of<float>(), width, y.of<float>());
      if (which == 2)
        set.rotate(x.of<float>(), scale.of<float>(), scale.of<float>() + half, half, 0.3f,
                   y.of<float>());
    };
    for (int which = 0; which < 3; ++which) {
      const std::int64_t made = which == 2 ? 2 * half : width;
      const Buffer expected = buffer<float>(width, 2);
      make(gemma::kPlain, expected, which);
      for (const InstructionSet* set : available()) {
        const Buffer y = buffer<float>(width, 3);
        make(*set, y, which);
        if (!is_equal(expected, y, made)) {
          std::printf("%s: row function %d, %ld numbers\n", set->name, which, long(made));
          return false;
        }
      }
    }
    return true;
  }

  // A pool whose threads never come: the work is shared out, and done by the one that does it.
  struct NoPool {
    template <typename Task>
    void Schedule(Task&&) {}
  };

  bool block_agrees() {
    const std::int64_t kv_heads = 1 + up_to(2), head_dim = 2 * (1 + up_to(8));
    const gemma::BlockShape shape{1 + up_to(40), kv_heads * (1 + up_to(2)), kv_heads, head_dim,
                                  1 + up_to(60), 1 + up_to(3), 1 + up_to(30)};
    const std::int64_t queries = shape.heads * head_dim, keys = kv_heads * head_dim;
    std::vector<std::vector<float>> kept;
    const auto numbers = [&](std::int64_t count) {
      kept.emplace_back(static_cast<std::size_t>(count));
      fill(kept.back().data(), count);
      return kept.back().data();
    };
    const auto matrix = [&](std::int64_t out_width, std::int64_t in_width) {
      return Matrix{reinterpret_cast<const char*>(numbers(out_width * in_width)), false, out_width,
                    in_width};
    };
    const auto norm = [&](std::int64_t width) -> const float* {
      return up_to(1) == 0 ? nullptr : numbers(width);
    };
    gemma::BlockWeights weights{};
    weights.pre_attention_norm = numbers(shape.width);
    weights.query = matrix(queries, shape.width);
    weights.key = matrix(keys, shape.width);
    weights.value = matrix(keys, shape.width);
    weights.query_norm = norm(head_dim);
    weights.key_norm = norm(head_dim);
    weights.attention_output = matrix(shape.width, queries);
    weights.post_attention_norm = norm(shape.width);
    weights.pre_ffw_norm = numbers(shape.width);
    weights.gate = matrix(shape.feed_forward, shape.width);
    weights.up = matrix(shape.feed_forward, shape.width);
    weights.down = matrix(shape.width, shape.feed_forward);
    weights.post_ffw_norm = norm(shape.width);
    gemma::BlockAdapters adapters{};
    std::vector<std::int32_t> ranks[7], adapter_slots;
    adapters.num_pairs = up_to(3);
    adapters.most_rank = 1 + up_to(9);
    const auto pairs = [&](int which, std::int64_t heads, std::int64_t in_width,
                           std::int64_t out_width) {
      for (std::int64_t pair = 0; pair < adapters.num_pairs; ++pair)
        ranks[which].push_back(static_cast<std::int32_t>(up_to(adapters.most_rank)));
      const std::int64_t all = adapters.num_pairs * heads * adapters.most_rank;
      return gemma::PairBank{numbers(all * in_width), numbers(all * out_width),
                             ranks[which].data(), heads, in_width, out_width};
    };
    adapters.query = pairs(0, shape.heads, shape.width, head_dim);
    adapters.key = pairs(1, kv_heads, shape.width, head_dim);
    adapters.value = pairs(2, kv_heads, shape.width, head_dim);
    adapters.attention_output = pairs(3, 1, queries, shape.width);
    adapters.gate = pairs(4, 1, shape.width, shape.feed_forward);
    adapters.up = pairs(5, 1, shape.width, shape.feed_forward);
    adapters.down = pairs(6, 1, shape.feed_forward, shape.width);
    const gemma::BlockTraits traits{numbers(head_dim / 2), up_to(40), 1e-6f, 0.25f,
                                    up_to(1) == 0 ? 0.0f : 5.0f};
    const std::int64_t count = up_to(40);
    std::vector<std::int32_t> slots, positions;
    for (std::int64_t token = 0; token < count; ++token) {
      const bool goes_on = token > 0 && up_to(3) != 0;
      // One too many: a slot that does not exist.
      slots.push_back(goes_on ? slots.back() : static_cast<std::int32_t>(up_to(shape.num_slots)));
      positions.push_back(goes_on ? positions.back() + 1 : static_cast<std::int32_t>(up_to(50)));
      adapter_slots.push_back(goes_on ? adapter_slots.back() : static_cast<std::int32_t>(up_to(4)));
    }
    if (up_to(1) == 0) adapters.slots = adapter_slots.data();
    const float* x = numbers(count * shape.width);
    const std::int64_t cache = shape.num_slots * keys * shape.num_positions;
    const float* caches[] = {numbers(cache), numbers(cache)};
    std::vector<float> expected;
    for (const InstructionSet* set : with_plain()) {
      std::vector<float> y(static_cast<std::size_t>(count * shape.width));
      std::vector<float> new_keys(caches[0], caches[0] + cache);
      std::vector<float> new_values(caches[1], caches[1] + cache);
      const gemma::BlockTokens tokens{count,    slots.data(),    positions.data(), x,
                                      y.data(), new_keys.data(), new_values.data()};
      NoPool pool;
      gemma::BlockPhases<NoPool>(pool, 1 + up_to(3), *set, shape, weights, adapters, traits,
                                 tokens)
          .run();
      y.insert(y.end(), new_keys.begin(), new_keys.end());
      y.insert(y.end(), new_values.begin(), new_values.end());
      if (set == &gemma::kPlain) expected = y;
      if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) != 0) {
        std::printf("%s: block of %ld tokens, width %ld\n", set->name, long(count),
                    long(shape.width));
        return false;
      }
    }
    return true;
  }

  static std::vector<const InstructionSet*> with_plain() {
    std::vector<const InstructionSet*> sets = available();
    sets.insert(sets.begin(), &gemma::kPlain);
    return sets;
  }

  bool low_rank_agrees() {
    const std::int64_t tokens = 1 + up_to(20), rank = 1 + up_to(20), in_width = up_to(100),
                       out_width = 1 + up_to(100), y_width = out_width + up_to(9);
    const std::int64_t numbers = (tokens - 1) * y_width + out_width;
    const Buffer x = buffer<float>(tokens * in_width, 0), a = buffer<float>(rank * in_width, 1);
    const Buffer b = buffer<float>(rank * out_width, 2);
    fill(x.of<float>(), tokens * in_width);
    fill(a.of<float>(), rank * in_width);
    fill(b.of<float>(), rank * out_width);
    std::vector<float> before(static_cast<std::size_t>(numbers));
    fill(before.data(), numbers);
    const auto add = [&](const InstructionSet& set, const Buffer& y) {
      const Buffer low = buffer<float>(tokens * rank, 4);
      std::memcpy(y.of<float>(), before.data(), before.size() * sizeof(float));
      set.add_low_rank(LowRankPart{x.of<float>(), a.of<float>(), b.of<float>(), y.of<float>(),
                                   low.of<float>(), tokens, rank, in_width, out_width, y_width});
    };
    const Buffer expected = buffer<float>(numbers, 3);
    add(gemma::kPlain, expected);
    for (const InstructionSet* set : available()) {
      const Buffer y = buffer<float>(numbers, 5);
      add(*set, y);
      // What is no output of the part must stay as it is, so all of it is compared.
      if (!is_equal(expected, y, numbers)) {
        std::printf("%s: low rank, %ld tokens, rank %ld, in %ld, out %ld of %ld\n", set->name,
                    long(tokens), long(rank), long(in_width), long(out_width), long(y_width));
        return false;
      }
    }
    return true;
  }

  template <typename Weight>
  bool back_agrees() {
    // More than a block of rows now and then, and then narrow ones.
    const bool is_deep = up_to(9) == 0;
    const std::int64_t rows = 1 + up_to(9), in_width = 1 + up_to(is_deep ? 20 : 120),
                       out_width = 1 + up_to(is_deep ? 600 : 20), begin = up_to(in_width - 1),
                       end = begin + 1 + up_to(in_width - begin - 1), numbers = rows * in_width;
    const Buffer y = buffer<float>(rows * out_width, 0);
    const Buffer weight = buffer<Weight>(out_width * in_width, 1);
    fill(y.of<float>(), rows * out_width);
    fill(weight.of<Weight>(), out_width * in_width);
    std::vector<float> before(static_cast<std::size_t>(numbers));
    fill(before.data(), numbers);
    const auto back = [&](const InstructionSet& set, const Buffer& x) {
      std::memcpy(x.of<float>(), before.data(), before.size() * sizeof(float));
      multiply_back(set, {y.of<float>(), weight.of<Weight>(), x.of<float>(), rows, in_width,
                          out_width, begin, end});
    };
    const Buffer expected = buffer<float>(numbers, 2);
    back(gemma::kPlain, expected);
    for (const InstructionSet* set : available()) {
      const Buffer x = buffer<float>(numbers, 3);
      back(*set, x);
      // What is no place of the part must stay as it is, so all of it is compared.
      if (!is_equal(expected, x, numbers)) {
        std::printf("%s: back, %ld rows, out %ld, places %ld to %ld of %ld\n", set->name,
                    long(rows), long(out_width), long(begin), long(end), long(in_width));
        return false;
      }
    }
    return true;
  }

  static void multiply_back(const InstructionSet& set, const BackPart<float>& part) {
    set.multiply_back_float32(part);
  }
  static void multiply_back(const InstructionSet& set, const BackPart<BFloat16>& part) {
    set.multiply_back_bfloat16(part);
  }

  static void multiply(const InstructionSet& set, const Part<float>& part) {
    set.multiply_float32(part);
  }
  static void multiply(const InstructionSet& set, const Part<BFloat16>& part) {
    set.multiply_bfloat16(part);
  }

  static bool is_equal(const Buffer& a, const Buffer& b, std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    return std::memcmp(a.of<float>(), b.of<float>(), bytes) == 0;
  }

  std::mt19937_64 random_;
  bool use_pages_ = false;
  char* pages_[6];
};

// A matrix of one row that is one number shorter than said. With whole lanes malloc's end is met,
// and with a few numbers of the last lanes the page.
int read_beyond(const char* name, const char* layout) {
  const bool is_page = std::strcmp(layout, "page") == 0;
  const std::int64_t width = is_page ? 17 : 16;
  char* page = is_page ? untouchable() : nullptr;
  const Buffer x(width * 4, 0, nullptr), weight((width - 1) * 4, 0, page), y(4, 0, nullptr);
  for (const InstructionSet* set :
       {&gemma::kAvx512, &gemma::kAvx2, &gemma::kNeon, &gemma::kPlain}) {
    if (std::strcmp(set->name, name) == 0 && set->is_available())
      set->multiply_float32({x.of<float>(), weight.of<float>(), y.of<float>(), 1, width, 1, 0, 1});
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 4 && std::strcmp(words[1], "beyond") == 0) return read_beyond(words[2], words[3]);
  if (count != 3) return 2;
  Fuzz fuzz(std::strtoull(words[2], nullptr, 10));
  const long shapes = std::strtol(words[1], nullptr, 10);
  for (long shape = 0; shape < shapes; ++shape) {
    if (!fuzz.agrees()) return 1;
  }
  std::printf("%ld shapes", shapes);
  for (const InstructionSet* set : available()) std::printf(" %s", set->name);
  std::printf("\n");
  return 0;
}
