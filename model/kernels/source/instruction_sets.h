// One table of functions for each instruction set, and which of them this process uses.
#pragma once

#include "attention.h"
#include "back_product.h"
#include "low_rank.h"
#include "product.h"

namespace gemma {

struct InstructionSet {
  const char* name;
  bool (*is_available)();
  void (*multiply_float32)(const Part<float>&);
  void (*multiply_bfloat16)(const Part<BFloat16>&);
  void (*multiply_back_float32)(const BackPart<float>&);
  void (*multiply_back_bfloat16)(const BackPart<BFloat16>&);
  void (*attend)(const AttentionPart&);
  void (*add_low_rank)(const LowRankPart&);
  // See row_functions.h.
  void (*normalize)(const float* x, const float* scale, std::int64_t width, float epsilon, float* y);
  void (*rotate)(const float* x, const float* cosines, const float* sines, std::int64_t half,
                 float factor, float* y);
  void (*gate)(const float* x, const float* up, std::int64_t count, float* y);
};

extern const InstructionSet kAvx512;
extern const InstructionSet kAvx2;
extern const InstructionSet kNeon;
// Plain C++; slow where a fused multiply-add is a function. It is what the others are held to.
extern const InstructionSet kPlain;

// What this process uses: the fastest that the processor has; null if it has none of them.
const InstructionSet* instruction_set();

}  // namespace gemma
