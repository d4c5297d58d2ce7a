// Attention of one token over the keys and values of its own sequence.
//
// Logits, their soft cap, softmax and the weighted sum of the values, key by key in ascending
// order of position. Nothing of another row enters, and nothing that stands beyond the token.
#pragma once

#include <cstdint>

namespace gemma {

// Query heads that may share a key head.
inline constexpr std::int64_t kMaxHeads = 32;

// The query heads of one row that share a key head. Position p stands at p modulo num_positions.
struct AttentionPart {
  const float* query;   // [heads, head_dim], scaled
  const float* keys;    // [num_positions, head_dim]
  const float* values;  // [num_positions, head_dim]
  float* context;       // [heads, head_dim]
  float* weights;       // [heads, last - first + 1], for the work in between
  std::int64_t heads;
  std::int64_t head_dim;
  std::int64_t num_positions;
  std::int64_t first;
  std::int64_t last;
  float logit_cap;  // 0 for none
};

}  // namespace gemma
