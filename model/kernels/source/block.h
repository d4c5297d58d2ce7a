// A decoder block over tokens that have a slot and a position each: all that lies between two
// residual streams, in one call. Phase by phase, and in each the threads share out the work:
//
//     x ── norm ── q, k, v ── norm, rotation ── cache, attention ── product ── norm ─ + ┐
//     └──────────────────────────────────────────────────────────────────────────────┘
//     ┌─────────────────────────────────────────────────────────────────────────────────┘
//     ├── norm ── gate · up ── product ── norm ── + ── y
//     └────────────────────────────────────────────┘
//
// Every number has one order of summation, and nothing of one token enters another but through the
// cache; so neither the number of tokens nor that of threads changes a bit.
#pragma once

#include <cstdint>

#include "instruction_sets.h"
#include "matrix.h"

namespace gemma {

// A norm that the architecture lacks is null.
struct BlockWeights {
  const float* pre_attention_norm;
  Matrix query, key, value;
  const float* query_norm;
  const float* key_norm;
  Matrix attention_output;
  const float* post_attention_norm;
  const float* pre_ffw_norm;
  Matrix gate, up, down;
  const float* post_ffw_norm;
};

// Low-rank pairs of one projection: A [pairs, heads, rank, in], B [pairs, heads, rank, out].
struct PairBank {
  const float* a = nullptr;
  const float* b = nullptr;
  const std::int32_t* ranks = nullptr;  // of each pair; 0 where an adapter lacks this projection
  std::int64_t heads = 0, in_width = 0, out_width = 0;
};

// The adapters that tokens may name: slot s has the pairs s - 1, and slot 0 is the base.
struct BlockAdapters {
  std::int64_t num_pairs = 0, most_rank = 0;
  const std::int32_t* slots = nullptr;  // of each token; null if there are no adapters
  PairBank query, key, value, attention_output, gate, up, down;
};

struct BlockShape {
  std::int64_t width, heads, kv_heads, head_dim, feed_forward;
  std::int64_t num_slots, num_positions;  // of the cache
};

struct BlockTraits {
  const float* frequencies;  // [head_dim / 2], radians a position
  std::int64_t window_tokens;
  float epsilon, query_scale;
  float logit_cap;  // 0 for none
};

// Token i continues the prompt of token i - 1 if it stands behind it in the same slot. A token whose
// slot does not exist writes nothing and attends to nothing.
struct BlockTokens {
  std::int64_t count;
  const std::int32_t* slots;
  const std::int32_t* positions;
  const float* x;  // [count, width]
  float* y;        // [count, width]
  float* keys;     // [slots, kv_heads, positions, head_dim]
  float* values;
};

}  // namespace gemma
