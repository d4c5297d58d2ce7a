// Lets the functions between two marks use an instruction set that the rest of the library may not.
#pragma once

#define GEMMA_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define GEMMA_BEGIN_TARGET(set) \
  GEMMA_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define GEMMA_END_TARGET _Pragma("clang attribute pop")
#else
#define GEMMA_BEGIN_TARGET(set) \
  GEMMA_PRAGMA(GCC push_options) GEMMA_PRAGMA(GCC target(set))
#define GEMMA_END_TARGET _Pragma("GCC pop_options")
#endif
