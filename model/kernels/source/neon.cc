#include <cmath>
#include <cstring>

#include "instruction_sets.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace gemma::neon {
namespace {

struct Lanes {
  float32x4_t four[4];

  static Lanes zero() {
    const float32x4_t none = vdupq_n_f32(0.0f);
    return {{none, none, none, none}};
  }
  static Lanes load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  static Lanes load_first(const float* p, int count) {
    alignas(16) float filled[kLanes] = {};
    for (int i = 0; i < count; ++i) filled[i] = p[i];
    return load(filled);
  }
  static Lanes load(const BFloat16* p) {
    return {{widen(p), widen(p + 4), widen(p + 8), widen(p + 12)}};
  }
  static Lanes load_first(const BFloat16* p, int count) {
    alignas(16) BFloat16 filled[kLanes] = {};
    for (int i = 0; i < count; ++i) filled[i] = p[i];
    return load(filled);
  }
  static Lanes broadcast(float value) {
    const float32x4_t all = vdupq_n_f32(value);
    return {{all, all, all, all}};
  }
  Lanes times(float value) const {
    return {{vmulq_n_f32(four[0], value), vmulq_n_f32(four[1], value),
             vmulq_n_f32(four[2], value), vmulq_n_f32(four[3], value)}};
  }
  void store(float* p) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, four[i]);
  }
  void store_first(float* p, int count) const {
    alignas(16) float filled[kLanes];
    store(filled);
    for (int i = 0; i < count; ++i) p[i] = filled[i];
  }
  void add_product(const Lanes& x, const Lanes& w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = vfmaq_f32(four[i], x.four[i], w.four[i]);
  }

  static float32x4_t widen(const BFloat16* p) {
    const uint16x4_t halves = vld1_u16(reinterpret_cast<const std::uint16_t*>(p));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
  }
};

// Of thirty-two registers, twenty-four hold sums.
constexpr int kTileRows = 2;

constexpr int tile_outputs(std::int64_t rows) { return rows == 1 ? 4 : 3; }

inline void fetch(std::uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

inline float sum_of(const Lanes& lanes) {
  const float32x4_t low = vaddq_f32(lanes.four[0], lanes.four[2]);
  const float32x4_t high = vaddq_f32(lanes.four[1], lanes.four[3]);
  const float32x4_t sums = vaddq_f32(low, high);
  const float32x2_t two = vadd_f32(vget_low_f32(sums), vget_high_f32(sums));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

template <int Rows, int Outputs>
inline void store_sums(const Lanes (&sums)[Rows][Outputs], float* y, std::int64_t out_width) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) y[r * out_width + o] = sum_of(sums[r][o]);
  }
}

#include "tiles.h"

#include "add_low_rank.h"
#include "attend.h"
#include "back_tiles.h"
#include "row_functions.h"

}  // namespace
}  // namespace gemma::neon

namespace gemma {
namespace {
bool is_available() { return true; }
}  // namespace
const InstructionSet kNeon{"neon", is_available, neon::multiply<float>, neon::multiply<BFloat16>,
                             neon::multiply_back<float>, neon::multiply_back<BFloat16>,
                           neon::attend,
                             neon::add_low_rank, neon::normalize, neon::rotate, neon::gate};
}  // namespace gemma

#else
namespace gemma {
namespace {
bool is_available() { return false; }
}  // namespace
const InstructionSet kNeon{"neon", is_available, nullptr, nullptr, nullptr,
                             nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace gemma
#endif
