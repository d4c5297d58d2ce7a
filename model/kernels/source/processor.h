// What this processor has and the system keeps, asked of the processor itself: with one of our
// compilers (Zig's Clang) __builtin_cpu_supports links and says no to everything.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace gemma {

struct Processor {
  bool avx2_and_fma;
  bool avx512f;
};

inline Processor processor() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return {false, false};
  const bool fma = (c & (1u << 12)) != 0, xsave = (c & (1u << 27)) != 0;
  if (!xsave) return {false, false};
  // Registers that the system does not save between threads may not be used.
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool saves_ymm = (low & 0x06u) == 0x06u, saves_zmm = (low & 0xe6u) == 0xe6u;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return {false, false};
  const bool avx2 = (b & (1u << 5)) != 0, avx512f = (b & (1u << 16)) != 0;
  return {saves_ymm && avx2 && fma, saves_zmm && avx512f};
}

}  // namespace gemma
#endif  // __x86_64__
