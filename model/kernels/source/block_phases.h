// The phases of a block, for any pool of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "block.h"
#include "shared_work.h"

namespace gemma {

template <typename Pool>
class BlockPhases {
 public:
  BlockPhases(Pool& pool, std::int64_t threads, const InstructionSet& set, const BlockShape& shape,
              const BlockWeights& weights, const BlockAdapters& adapters,
              const BlockTraits& traits, const BlockTokens& tokens)
      : pool_(pool), threads_(threads), set_(set), shape_(shape), weights_(weights),
        adapters_(adapters), traits_(traits), tokens_(tokens), runs_(runs_of(adapters, tokens)) {
    const std::int64_t query_width = shape.heads * shape.head_dim;
    const std::int64_t key_width = shape.kv_heads * shape.head_dim;
    const std::int64_t of_token =
        2 * shape.width + 2 * query_width + 2 * key_width + 2 * shape.feed_forward;
    // Kept by the thread: memory that is new to a process costs more than the work in it.
    thread_local std::vector<float> scratch;
    scratch.resize(static_cast<std::size_t>(of_token * tokens.count));
    float* next = scratch.data();
    const auto take = [&](std::int64_t width) {
      float* taken = next;
      next += width * tokens.count;
      return taken;
    };
    normalized_ = take(shape.width);
    query_ = take(query_width);
    key_ = take(key_width);
    value_ = take(key_width);
    context_ = take(query_width);
    sum_ = take(shape.width);
    gate_ = take(shape.feed_forward);
    up_ = take(shape.feed_forward);
  }

  void run() {
    if (tokens_.count == 0) return;
    for_tokens([&](std::int64_t token) {
      normalize(tokens_.x, weights_.pre_attention_norm, token, normalized_);
    });
    make_heads();
    add_adapters(adapters_.query, normalized_, query_);
    add_adapters(adapters_.key, normalized_, key_);
    add_adapters(adapters_.value, normalized_, value_);
    attend();
    multiply_all(weights_.attention_output, context_, sum_, weights_.gate);
    add_adapters(adapters_.attention_output, context_, sum_);
    for_tokens([&](std::int64_t token) {
      add(tokens_.x, weights_.post_attention_norm, token);
      normalize(tokens_.y, weights_.pre_ffw_norm, token, normalized_);
    });
    make_gated();
    multiply_all(weights_.down, gate_, sum_, Matrix{});
    add_adapters(adapters_.down, gate_, sum_);
    for_tokens([&](std::int64_t token) { add(tokens_.y, weights_.post_ffw_norm, token); });
  }

 private:
  // Tokens for which a norm is worth waking a thread.
  static constexpr std::int64_t kTokensWorthSharing = 32;
  // Numbers of keys and values that are read before another thread has woken up.
  static constexpr std::int64_t kNumbersWorthSharing = 64 * 1024;
  // Likewise heads whose norms and rotations are to be made.
  static constexpr std::int64_t kHeadsWorthSharing = 16;

  template <typename Work>
  void for_tokens(const Work& work) {
    const std::int64_t threads = tokens_.count < kTokensWorthSharing ? 1 : threads_;
    share_work(pool_, threads, tokens_.count, [&](const Turn& turn) { work(turn.piece); });
  }

  void normalize(const float* x, const float* scale, std::int64_t token, float* y) {
    const std::int64_t first = token * shape_.width;
    set_.normalize(x + first, scale, shape_.width, traits_.epsilon, y + first);
  }

  // y = before + what a product gave, normalised if the architecture does that.
  void add(const float* before, const float* scale, std::int64_t token) {
    if (scale != nullptr) normalize(sum_, scale, token, sum_);
    const std::int64_t first = token * shape_.width;
    for (std::int64_t i = first; i < first + shape_.width; ++i)
      tokens_.y[i] = before[i] + sum_[i];
  }

  // What the next phase reads first, for a thread that has nothing else to do in this one.
  Memory opening(const Matrix& matrix, const Turn& turn) const {
    return matrix.first(turn.thread * kFirstOutputs);
  }

  // The three products of the normalised stream, as one with all of their outputs.
  void make_heads() {
    const Matrix* const matrices[] = {&weights_.query, &weights_.key, &weights_.value};
    float* const results[] = {query_, key_, value_};
    const std::int64_t all = weights_.query.out_width + 2 * weights_.key.out_width;
    const std::int64_t outputs = outputs_of_piece(all, weights_.query.row_bytes(), threads_);
    share_work(pool_, threads_, (all + outputs - 1) / outputs, [&](const Turn& turn) {
      std::int64_t first = 0;
      for (int i = 0; i < 3; ++i) {
        const Matrix& matrix = *matrices[i];
        const std::int64_t begin = std::max(turn.piece * outputs - first, std::int64_t{0});
        const std::int64_t end = std::min((turn.piece + 1) * outputs - first, matrix.out_width);
        if (begin < end)
          multiply(set_, matrix, normalized_, tokens_.count, results[i], begin, end,
                   after_heads(turn, outputs));
        first += matrix.out_width;
      }
    });
  }

  Memory after_heads(const Turn& turn, std::int64_t outputs) const {
    if (turn.following < 0) return opening(weights_.attention_output, turn);
    std::int64_t begin = turn.following * outputs;
    for (const Matrix* matrix : {&weights_.query, &weights_.key, &weights_.value}) {
      if (begin < matrix->out_width) return matrix->first(begin);
      begin -= matrix->out_width;
    }
    return {};
  }

  // All outputs of a matrix; `next` is read in the phase behind this one.
  void multiply_all(const Matrix& matrix, const float* x, float* y, const Matrix& next) {
    const std::int64_t outputs = outputs_of_piece(matrix.out_width, matrix.row_bytes(), threads_);
    const std::int64_t pieces = (matrix.out_width + outputs - 1) / outputs;
    share_work(pool_, threads_, pieces, [&](const Turn& turn) {
      const std::int64_t begin = turn.piece * outputs;
      multiply(set_, matrix, x, tokens_.count, y, begin,
               std::min(begin + outputs, matrix.out_width),
               turn.following < 0 ? opening(next, turn) : matrix.first(turn.following * outputs));
    });
  }

  // gelu(gate) · up, a piece of both at once; where adapters add to either, behind them.
  void make_gated() {
    const Matrix& matrix = weights_.gate;
    const bool is_adapted = has_adapters(adapters_.gate) || has_adapters(adapters_.up);
    const std::int64_t outputs =
        outputs_of_piece(matrix.out_width, 2 * matrix.row_bytes(), threads_);
    const std::int64_t pieces = (matrix.out_width + outputs - 1) / outputs;
    share_work(pool_, threads_, pieces, [&](const Turn& turn) {
      const std::int64_t begin = turn.piece * outputs;
      const std::int64_t end = std::min(begin + outputs, matrix.out_width);
      multiply(set_, matrix, normalized_, tokens_.count, gate_, begin, end,
               weights_.up.first(begin));
      multiply(set_, weights_.up, normalized_, tokens_.count, up_, begin, end,
               turn.following < 0 ? opening(weights_.down, turn)
                                  : matrix.first(turn.following * outputs));
      if (is_adapted) return;
      for (std::int64_t token = 0; token < tokens_.count; ++token) close_gate(token, begin, end);
    });
    if (!is_adapted) return;
    add_adapters(adapters_.gate, normalized_, gate_);
    add_adapters(adapters_.up, normalized_, up_);
    share_work(pool_, threads_, tokens_.count,
               [&](const Turn& turn) { close_gate(turn.piece, 0, matrix.out_width); });
  }

  void close_gate(std::int64_t token, std::int64_t begin, std::int64_t end) {
    float* gated = gate_ + token * shape_.feed_forward + begin;
    set_.gate(gated, up_ + token * shape_.feed_forward + begin, end - begin, gated);
  }

  // Consecutive tokens that use the same adapter.
  struct Run {
    std::int64_t first, tokens, pair;
  };

  // Enough to read matrices once for many tokens, few enough to share out.
  static constexpr std::int64_t kTokensOfRun = 16;
  // Numbers of matrices that are read before another thread has woken up.
  static constexpr std::int64_t kPairsWorthSharing = 32 * 1024;

  static std::vector<Run> runs_of(const BlockAdapters& adapters, const BlockTokens& tokens) {
    std::vector<Run> runs;
    if (adapters.slots == nullptr) return runs;
    for (std::int64_t token = 0; token < tokens.count; ++token) {
      const std::int64_t pair = std::int64_t{adapters.slots[token]} - 1;
      if (pair < 0 || pair >= adapters.num_pairs) continue;
      const bool goes_on = !runs.empty() && runs.back().pair == pair &&
                           runs.back().first + runs.back().tokens == token &&
                           runs.back().tokens < kTokensOfRun;
      if (goes_on)
        ++runs.back().tokens;
      else
        runs.push_back({token, 1, pair});
    }
    return runs;
  }

  std::int64_t rank_of(const PairBank& bank, const Run& run) const {
    return std::clamp<std::int64_t>(bank.ranks[run.pair], 0, adapters_.most_rank);
  }

  bool has_adapters(const PairBank& bank) const {
    return std::any_of(runs_.begin(), runs_.end(),
                       [&](const Run& run) { return rank_of(bank, run) > 0; });
  }

  // y gains what the adapters of tokens make of x.
  void add_adapters(const PairBank& bank, const float* x, float* y) {
    if (runs_.empty() || !has_adapters(bank)) return;
    std::int64_t numbers = 0;
    for (const Run& run : runs_)
      numbers += bank.heads * rank_of(bank, run) * (bank.in_width + bank.out_width);
    const std::int64_t threads = numbers < kPairsWorthSharing ? 1 : threads_;
    const std::int64_t y_width = bank.heads * bank.out_width;
    share_work(pool_, threads, static_cast<std::int64_t>(runs_.size()) * bank.heads,
               [&](const Turn& turn) {
                 const Run& run = runs_[static_cast<std::size_t>(turn.piece / bank.heads)];
                 const std::int64_t head = turn.piece % bank.heads, rank = rank_of(bank, run);
                 if (rank == 0) return;
                 thread_local std::vector<float> low;
                 low.resize(static_cast<std::size_t>(run.tokens * rank));
                 const std::int64_t matrix =
                     (run.pair * bank.heads + head) * adapters_.most_rank;
                 set_.add_low_rank({x + run.first * bank.in_width,
                                    bank.a + matrix * bank.in_width,
                                    bank.b + matrix * bank.out_width,
                                    y + run.first * y_width + head * bank.out_width, low.data(),
                                    run.tokens, rank, bank.in_width, bank.out_width, y_width});
               });
  }

  bool has_slot(std::int64_t token) const {
    return tokens_.slots[token] >= 0 && tokens_.slots[token] < shape_.num_slots &&
           tokens_.positions[token] >= 0;
  }

  bool continues(std::int64_t token) const {
    return tokens_.slots[token] == tokens_.slots[token - 1] &&
           tokens_.positions[token] == std::int64_t{tokens_.positions[token - 1]} + 1;
  }

  // Prompts of different slots together: one that stands where another stood comes after it.
  void attend() {
    std::vector<bool> is_taken(static_cast<std::size_t>(shape_.num_slots), false);
    bool is_single = true;
    std::int64_t first = 0;
    for (std::int64_t token = 0; token < tokens_.count; ++token) {
      if (!has_slot(token)) continue;
      if (token > first && has_slot(token - 1) && continues(token)) {
        is_single = false;
        continue;
      }
      const auto slot = static_cast<std::size_t>(tokens_.slots[token]);
      if (is_taken[slot]) {
        attend_together(first, token, is_single);
        std::fill(is_taken.begin(), is_taken.end(), false);
        is_single = true;
        first = token;
      }
      is_taken[slot] = true;
    }
    attend_together(first, tokens_.count, is_single);
  }

  void attend_together(std::int64_t first, std::int64_t end, bool is_single) {
    const std::int64_t pieces = (end - first) * shape_.kv_heads;
    std::int64_t numbers = 0;
    for (std::int64_t token = first; token < end; ++token) {
      if (has_slot(token)) numbers += 2 * num_seen(token) * shape_.kv_heads * shape_.head_dim;
    }
    const bool is_worth_it = numbers >= kNumbersWorthSharing ||
                             pieces * (shape_.heads / shape_.kv_heads) >= kHeadsWorthSharing;
    const std::int64_t threads = is_worth_it ? threads_ : 1;
    const auto prepare = [&](const Turn& turn) {
      place_token(first + turn.piece / shape_.kv_heads, turn.piece % shape_.kv_heads);
    };
    const auto look = [&](const Turn& turn) {
      attend_token(first + turn.piece / shape_.kv_heads, turn.piece % shape_.kv_heads);
    };
    if (is_single) {
      share_work(pool_, threads, pieces, [&](const Turn& turn) { prepare(turn), look(turn); });
    } else {
      share_work(pool_, threads, pieces, prepare);
      share_work(pool_, threads, pieces, look);
    }
  }

  std::int64_t num_seen(std::int64_t token) const {
    const std::int64_t most = std::min(traits_.window_tokens, shape_.num_positions);
    return std::max(std::min(std::int64_t{tokens_.positions[token]} + 1, most), std::int64_t{0});
  }

  // Norms and rotations of one key head and of the query heads that share it; key and value go into
  // the cache.
  void place_token(std::int64_t token, std::int64_t kv_head) {
    if (!has_slot(token)) return;
    const std::int64_t half = shape_.head_dim / 2, sharing = shape_.heads / shape_.kv_heads;
    thread_local std::vector<float> angles;
    angles.resize(static_cast<std::size_t>(shape_.head_dim));
    float *cosines = angles.data(), *sines = angles.data() + half;
    const float position = static_cast<float>(tokens_.positions[token]);
    for (std::int64_t i = 0; i < half; ++i) {
      const float angle = position * traits_.frequencies[i];
      cosines[i] = std::cos(angle);
      sines[i] = std::sin(angle);
    }
    float* query = query_ + (token * shape_.heads + kv_head * sharing) * shape_.head_dim;
    for (std::int64_t head = 0; head < sharing; ++head, query += shape_.head_dim) {
      normalize_head(query, weights_.query_norm);
      set_.rotate(query, cosines, sines, half, traits_.query_scale, query);
    }
    const std::int64_t head = (token * shape_.kv_heads + kv_head) * shape_.head_dim;
    const std::int64_t place = place_in_cache(token, kv_head) +
                               tokens_.positions[token] % shape_.num_positions * shape_.head_dim;
    normalize_head(key_ + head, weights_.key_norm);
    set_.rotate(key_ + head, cosines, sines, half, 1.0f, tokens_.keys + place);
    std::copy_n(value_ + head, shape_.head_dim, tokens_.values + place);
  }

  void normalize_head(float* head, const float* scale) {
    if (scale != nullptr) set_.normalize(head, scale, shape_.head_dim, traits_.epsilon, head);
  }

  std::int64_t place_in_cache(std::int64_t token, std::int64_t kv_head) const {
    return (tokens_.slots[token] * shape_.kv_heads + kv_head) * shape_.num_positions *
           shape_.head_dim;
  }

  void attend_token(std::int64_t token, std::int64_t kv_head) {
    const std::int64_t sharing = shape_.heads / shape_.kv_heads;
    const std::int64_t first = (token * shape_.heads + kv_head * sharing) * shape_.head_dim;
    const std::int64_t seen = has_slot(token) ? num_seen(token) : 0;
    if (seen == 0) {
      std::fill_n(context_ + first, sharing * shape_.head_dim, 0.0f);
      return;
    }
    thread_local std::vector<float> weights;
    weights.resize(static_cast<std::size_t>(sharing * seen));
    const std::int64_t place = place_in_cache(token, kv_head);
    const std::int64_t last = tokens_.positions[token];
    set_.attend({query_ + first, tokens_.keys + place, tokens_.values + place, context_ + first,
                 weights.data(), sharing, shape_.head_dim, shape_.num_positions, last - seen + 1,
                 last, traits_.logit_cap});
  }

  Pool& pool_;
  const std::int64_t threads_;
  const InstructionSet& set_;
  const BlockShape& shape_;
  const BlockWeights& weights_;
  const BlockAdapters& adapters_;
  const BlockTraits& traits_;
  const BlockTokens& tokens_;
  const std::vector<Run> runs_;
  float *normalized_, *query_, *key_, *value_, *context_, *sum_, *gate_, *up_;
};

}  // namespace gemma
