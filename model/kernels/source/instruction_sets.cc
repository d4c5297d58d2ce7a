// Which instruction set this processor works with, chosen at run time.
#include "instruction_sets.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace gemma {
namespace {

const InstructionSet* const kFastestFirst[] = {&kAvx512, &kAvx2, &kNeon};

const InstructionSet* fastest() {
  for (const InstructionSet* set : kFastestFirst) {
    if (set->is_available()) return set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{fastest()};
  return set;
}

}  // namespace

const InstructionSet* instruction_set() { return chosen().load(std::memory_order_relaxed); }

}  // namespace gemma

#define GEMMA_EXPORT extern "C" __attribute__((visibility("default")))

// The name of what is used; empty if this processor has none of them.
GEMMA_EXPORT const char* gemma_kernels_instruction_set() {
  const gemma::InstructionSet* set = gemma::instruction_set();
  return set == nullptr ? "" : set->name;
}

// For tests: uses another one from now on. 0 if this processor does not have it.
GEMMA_EXPORT int gemma_kernels_use(const char* name) {
  for (const gemma::InstructionSet* set :
       {&gemma::kAvx512, &gemma::kAvx2, &gemma::kNeon, &gemma::kPlain}) {
    if (std::strcmp(set->name, name) == 0 && set->is_available()) {
      gemma::chosen().store(set, std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}
