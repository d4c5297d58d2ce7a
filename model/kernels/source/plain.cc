// The order of every sum, said as plainly as C++ can; the others are held to its bits. Slow, where a
// fused multiply-add is no instruction that the compiler may assume.
#include <cmath>
#include <cstring>

#include "instruction_sets.h"

namespace gemma {
namespace {

float value_of(float weight) { return weight; }

float value_of(BFloat16 weight) {
  const std::uint32_t bits = std::uint32_t{weight.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Weight>
float dot(const float* x, const Weight* weight, std::int64_t width) {
  float sums[kLanes] = {};
  const std::int64_t filled = (width + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t place = 0; place < filled; ++place) {
    const bool is_within = place < width;
    float& sum = sums[place % kLanes];
    sum = std::fma(is_within ? x[place] : 0.0f, is_within ? value_of(weight[place]) : 0.0f, sum);
  }
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <typename Weight>
void multiply(const Part<Weight>& part) {
  for (std::int64_t row = 0; row < part.rows; ++row) {
    for (std::int64_t output = part.begin; output < part.end; ++output) {
      part.y[row * part.out_width + output] =
          dot(part.x + row * part.in_width, part.weight + output * part.in_width, part.in_width);
    }
  }
}

template <typename Weight>
void multiply_back(const BackPart<Weight>& part) {
  for (std::int64_t row = 0; row < part.rows; ++row) {
    for (std::int64_t place = part.begin; place < part.end; ++place) {
      float total = 0.0f, sum = 0.0f;
      for (std::int64_t out = 0; out < part.out_width; ++out) {
        sum = std::fma(part.y[row * part.out_width + out],
                       value_of(part.weight[out * part.in_width + place]), sum);
        if ((out + 1) % kDepth == 0 || out + 1 == part.out_width) {
          total = out < kDepth ? sum : total + sum;
          sum = 0.0f;
        }
      }
      part.x[row * part.in_width + place] = total;
    }
  }
}

// Sixteen partial sums that are no registers.
struct Lanes {
  float sums[kLanes];

  static Lanes zero() { return {}; }
  static Lanes load(const float* p) { return load_first(p, kLanes); }
  static Lanes load_first(const float* p, int count) {
    Lanes lanes{};
    for (int i = 0; i < count; ++i) lanes.sums[i] = p[i];
    return lanes;
  }
  static Lanes broadcast(float value) {
    Lanes lanes;
    for (float& sum : lanes.sums) sum = value;
    return lanes;
  }
  void add_product(const Lanes& x, const Lanes& w) {
    for (int i = 0; i < kLanes; ++i) sums[i] = std::fma(x.sums[i], w.sums[i], sums[i]);
  }
  Lanes times(float value) const {
    Lanes lanes;
    for (int i = 0; i < kLanes; ++i) lanes.sums[i] = sums[i] * value;
    return lanes;
  }
  void store(float* p) const { store_first(p, kLanes); }
  void store_first(float* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = sums[i];
  }
};

constexpr int kTileRows = 1;

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

#include "add_low_rank.h"
#include "attend.h"
#include "row_functions.h"

bool is_available() { return true; }

}  // namespace

const InstructionSet kPlain{"plain", is_available, multiply<float>, multiply<BFloat16>,
                             multiply_back<float>, multiply_back<BFloat16>, attend,
                             add_low_rank, normalize, rotate, gate};

}  // namespace gemma
