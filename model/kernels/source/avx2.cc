#include <cmath>
#include <cstring>

#include "instruction_sets.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "processor.h"
#include "target.h"

GEMMA_BEGIN_TARGET("avx2,fma")
namespace gemma::avx2 {
namespace {

struct Lanes {
  __m256 low;
  __m256 high;

  static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Lanes load_first(const float* p, int count) {
    alignas(32) float filled[kLanes] = {};
    for (int i = 0; i < count; ++i) filled[i] = p[i];
    return load(filled);
  }
  static Lanes load(const BFloat16* p) { return {widen(p), widen(p + 8)}; }
  static Lanes load_first(const BFloat16* p, int count) {
    alignas(32) BFloat16 filled[kLanes] = {};
    for (int i = 0; i < count; ++i) filled[i] = p[i];
    return load(filled);
  }
  static Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  Lanes times(float value) const {
    const __m256 factor = _mm256_set1_ps(value);
    return {_mm256_mul_ps(low, factor), _mm256_mul_ps(high, factor)};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  void store_first(float* p, int count) const {
    alignas(32) float filled[kLanes];
    store(filled);
    for (int i = 0; i < count; ++i) p[i] = filled[i];
  }
  void add_product(const Lanes& x, const Lanes& w) {
    low = _mm256_fmadd_ps(x.low, w.low, low);
    high = _mm256_fmadd_ps(x.high, w.high, high);
  }

  static __m256 widen(const BFloat16* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
};

// Of sixteen registers, twelve hold sums.
constexpr int kTileRows = 2;

constexpr int tile_outputs(std::int64_t rows) { return rows == 1 ? 4 : 3; }

// Into the second cache: the first holds what the tile works on, and no more.
inline void fetch(std::uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
}

inline __m128 four_of(const Lanes& lanes) {
  const __m256 eight = _mm256_add_ps(lanes.low, lanes.high);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#include "four_sums.h"
#include "tiles.h"

#include "add_low_rank.h"
#include "attend.h"
#include "back_tiles.h"
#include "row_functions.h"

}  // namespace
}  // namespace gemma::avx2
GEMMA_END_TARGET

namespace gemma {
namespace {
bool is_available() { return processor().avx2_and_fma; }
}  // namespace
const InstructionSet kAvx2{"avx2", is_available, avx2::multiply<float>, avx2::multiply<BFloat16>,
                             avx2::multiply_back<float>, avx2::multiply_back<BFloat16>,
                           avx2::attend,
                             avx2::add_low_rank, avx2::normalize, avx2::rotate, avx2::gate};
}  // namespace gemma

#else
namespace gemma {
namespace {
bool is_available() { return false; }
}  // namespace
const InstructionSet kAvx2{"avx2", is_available, nullptr, nullptr, nullptr,
                             nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace gemma
#endif
