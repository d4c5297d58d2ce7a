// What a custom call says when it is given something else.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace gemma {

using Dimensions = xla::ffi::Span<const std::int64_t>;

inline constexpr char kNoInstructionSet[] =
    "This processor has none of the instruction sets of the native kernels.";

inline std::string shape_of(Dimensions dimensions) {
  std::string text = "[";
  for (std::size_t i = 0; i < dimensions.size(); ++i)
    text += (i == 0 ? "" : ", ") + std::to_string(dimensions[i]);
  return text + "]";
}

inline bool is_same(Dimensions a, Dimensions b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

inline bool is_shape(Dimensions dimensions, std::initializer_list<std::int64_t> expected) {
  return is_same(dimensions, Dimensions(expected.begin(), expected.size()));
}

}  // namespace gemma
