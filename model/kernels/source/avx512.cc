#include <cmath>
#include <cstring>

#include "instruction_sets.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "processor.h"
#include "target.h"

GEMMA_BEGIN_TARGET("avx512f")
namespace gemma::avx512 {
namespace {

struct Lanes {
  __m512 sums;

  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load_first(const float* p, int count) {
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  static Lanes load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Lanes load_first(const BFloat16* p, int count) {
    alignas(32) BFloat16 filled[kLanes] = {};
    for (int i = 0; i < count; ++i) filled[i] = p[i];
    return load(filled);
  }
  static Lanes broadcast(float value) { return {_mm512_set1_ps(value)}; }
  Lanes times(float value) const { return {_mm512_mul_ps(sums, _mm512_set1_ps(value))}; }
  void store(float* p) const { _mm512_storeu_ps(p, sums); }
  void store_first(float* p, int count) const { _mm512_mask_storeu_ps(p, first(count), sums); }
  void add_product(Lanes x, Lanes w) { sums = _mm512_fmadd_ps(x.sums, w.sums, sums); }

  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Lanes widen(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
};

// Four rows beside six outputs need ten loads for twenty-four products, and divide the row counts
// that are served.
constexpr int kTileRows = 4;

constexpr int tile_outputs(std::int64_t rows) {
  constexpr int kOutputs[] = {8, 8, 8, 6};
  return kOutputs[rows - 1];
}

// Into the second cache: the first holds what the tile works on, and no more.
inline void fetch(std::uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
}

inline __m128 four_of(Lanes lanes) {
  const __m256 low = _mm512_castps512_ps256(lanes.sums);
  const __m256 high =
      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes.sums), 1));
  const __m256 eight = _mm256_add_ps(low, high);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#include "four_sums.h"
#include "tiles.h"

#include "add_low_rank.h"
#include "attend.h"
#include "back_tiles.h"
#include "row_functions.h"

}  // namespace
}  // namespace gemma::avx512
GEMMA_END_TARGET

namespace gemma {
namespace {
bool is_available() { return processor().avx512f; }
}  // namespace
const InstructionSet kAvx512{"avx512", is_available, avx512::multiply<float>,
                             avx512::multiply<BFloat16>,
                             avx512::multiply_back<float>, avx512::multiply_back<BFloat16>, avx512::attend,
                             avx512::add_low_rank, avx512::normalize, avx512::rotate, avx512::gate};
}  // namespace gemma

#else
namespace gemma {
namespace {
bool is_available() { return false; }
}  // namespace
const InstructionSet kAvx512{"avx512", is_available, nullptr, nullptr, nullptr,
                             nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace gemma
#endif
