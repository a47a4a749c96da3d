#include "tiles.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "simd.hpp"

#if E2E_X86
#include <immintrin.h>
#endif

namespace e2e {
namespace {

constexpr int64_t kVectors = kTileCols / 16;  // columns of a tile, in vectors of 16

/// Plain C++ for any processor, over float words; the compiler vectorises the inner loop.
E2E_CLONES
void tile_generic(const uint32_t* a_words, const uint32_t* b_words, int64_t words, float* out) {
  const auto* a = reinterpret_cast<const float*>(a_words);
  const auto* b = reinterpret_cast<const float*>(b_words);
  for (int64_t r0 = 0; r0 < kTileRows; r0 += 4)
    for (int64_t c0 = 0; c0 < kTileCols; c0 += 16) {
      float acc[4][16] = {};
      for (int64_t k = 0; k < words; ++k)
        for (int r = 0; r < 4; ++r)
          for (int c = 0; c < 16; ++c) acc[r][c] += a[k * kTileRows + r0 + r] * b[k * kTileCols + c0 + c];
      for (int r = 0; r < 4; ++r) std::memcpy(out + (r0 + r) * kTileCols + c0, acc[r], sizeof acc[r]);
    }
}

#if E2E_X86
#define E2E_TARGET "avx512f,avx512bw,avx512vl,avx512dq"
#define E2E_INLINE __attribute__((always_inline)) static inline

struct FloatStep {
  using Acc = __m512;
  __attribute__((target(E2E_TARGET))) E2E_INLINE Acc zero() { return _mm512_setzero_ps(); }
  __attribute__((target(E2E_TARGET))) E2E_INLINE Acc step(Acc acc, const uint32_t* a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*a))), _mm512_castsi512_ps(b), acc);
  }
  __attribute__((target(E2E_TARGET))) E2E_INLINE __m512 result(Acc acc, int32_t) { return acc; }
};
struct Bf16Step {
  using Acc = __m512;
  __attribute__((target(E2E_TARGET))) E2E_INLINE Acc zero() { return _mm512_setzero_ps(); }
  __attribute__((target(E2E_TARGET ",avx512bf16"))) E2E_INLINE Acc step(Acc acc, const uint32_t* a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)));
  }
  __attribute__((target(E2E_TARGET))) E2E_INLINE __m512 result(Acc acc, int32_t) { return acc; }
};
struct Int8Step {
  using Acc = __m512i;
  __attribute__((target(E2E_TARGET))) E2E_INLINE Acc zero() { return _mm512_setzero_si512(); }
  __attribute__((target(E2E_TARGET ",avx512vnni"))) E2E_INLINE Acc step(Acc acc, const uint32_t* a, __m512i b) {
    // _mm512_dpbusd_epi32 makes gcc 12 spill every accumulator; the instruction itself takes the broadcast operand.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*a));
    return acc;
  }
  __attribute__((target(E2E_TARGET))) E2E_INLINE __m512 result(Acc acc, int32_t offset) {
    // Under the zero mask's form gcc 12 does not warn about its own header.
    return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_add_epi32(acc, _mm512_set1_epi32(offset)));
  }
};

template <class Step>
using Sums = typename Step::Acc[kTileRows][kVectors];

/// Declares `acc`, the products of the panels, in vectors of 16 columns.
#define E2E_MULTIPLY(STEP, acc)                                                                              \
  Sums<STEP> acc;                                                                                            \
  _Pragma("GCC unroll 8") for (int r = 0; r < kTileRows; ++r)                                                \
      _Pragma("GCC unroll 3") for (int v = 0; v < kVectors; ++v) acc[r][v] = STEP::zero();                   \
  for (int64_t k = 0; k < words; ++k, a += kTileRows, b += kTileCols) {                                      \
    const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 16), b2 = _mm512_load_si512(b + 32); \
    _Pragma("GCC unroll 8") for (int r = 0; r < kTileRows; ++r) {                                            \
      acc[r][0] = STEP::step(acc[r][0], a + r, b0);                                                          \
      acc[r][1] = STEP::step(acc[r][1], a + r, b1);                                                          \
      acc[r][2] = STEP::step(acc[r][2], a + r, b2);                                                          \
    }                                                                                                        \
  }

#define E2E_TILE(NAME, STEP, TARGET)                                                                                 \
  __attribute__((target(TARGET))) void NAME(const uint32_t* a, const uint32_t* b, int64_t words,                     \
                                            const int32_t* offset, __m512(&out)[kTileRows][kVectors]) {              \
    E2E_MULTIPLY(STEP, acc)                                                                                          \
    _Pragma("GCC unroll 8") for (int r = 0; r < kTileRows; ++r)                                                      \
        _Pragma("GCC unroll 3") for (int v = 0; v < kVectors; ++v) out[r][v] = STEP::result(acc[r][v], offset[r]);   \
  }                                                                                                                  \
  __attribute__((target(TARGET))) void NAME##_above(const uint32_t* a, const uint32_t* b, int64_t words,             \
                                                    const int32_t* offset, const float* base, const float* slope,    \
                                                    const float* unit, uint64_t* above) {                            \
    E2E_MULTIPLY(STEP, acc)                                                                                          \
    _Pragma("GCC unroll 8") for (int r = 0; r < kTileRows; ++r) {                                                    \
      uint64_t bits = 0;                                                                                             \
      _Pragma("GCC unroll 3") for (int v = 0; v < kVectors; ++v) {                                                   \
        const __m512 limit =                                                                                         \
            _mm512_fmadd_ps(_mm512_load_ps(slope + 16 * v), _mm512_set1_ps(unit[r]), _mm512_load_ps(base + 16 * v)); \
        const __m512 product = STEP::result(acc[r][v], offset[r]);                                                   \
        bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(product, limit, _CMP_NLE_UQ)) << (16 * v);                  \
      }                                                                                                              \
      above[r] = bits;                                                                                               \
    }                                                                                                                \
  }
E2E_TILE(tile_float32, FloatStep, E2E_TARGET)
E2E_TILE(tile_bfloat16, Bf16Step, E2E_TARGET ",avx512bf16")
E2E_TILE(tile_int8, Int8Step, E2E_TARGET ",avx512vnni")
#endif

}  // namespace

int64_t element_bytes(Precision precision) {
  return precision == Precision::float32 ? 4 : precision == Precision::bfloat16 ? 2 : 1;
}

bool native(Precision precision) {
  if (precision == Precision::float32) return true;
#if E2E_X86
  if (simd_level() != Simd::avx512) return false;
  return precision == Precision::bfloat16 ? __builtin_cpu_supports("avx512bf16") : __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Engine engine_for(Precision precision) {
  if (!native(precision)) return Engine::generic;
  switch (precision) {
    case Precision::bfloat16: return Engine::bfloat16;
    case Precision::int8: return Engine::int8;
    default: return simd_level() == Simd::avx512 ? Engine::float32 : Engine::generic;
  }
}

int64_t words_per_row(Precision precision, Engine engine, int64_t depth) {
  return engine == Engine::generic ? depth : depth * element_bytes(precision) / 4;
}

void to_words(Precision precision, Engine engine, const void* stored, int64_t depth, uint32_t* words) {
  if (engine != Engine::generic || precision == Precision::float32) {
    std::memcpy(words, stored, depth * element_bytes(precision));
    return;
  }
  float* const value = reinterpret_cast<float*>(words);
  for (int64_t k = 0; k < depth; ++k)
    value[k] = precision == Precision::bfloat16 ? bfloat16_to_float(static_cast<const uint16_t*>(stored)[k])
                                                : static_cast<const int8_t*>(stored)[k];
}

int32_t int8_offset(const int8_t* stored, int64_t depth) { return -128 * std::accumulate(stored, stored + depth, 0); }

void pack(const uint32_t* words, int64_t count, uint32_t flip, int64_t width, int64_t place, uint32_t* panel) {
  for (int64_t k = 0; k < count; ++k) panel[k * width + place] = (words ? words[k] : 0) ^ flip;
}

void multiply(Engine engine, const uint32_t* rows, const uint32_t* columns, int64_t words, const int32_t* offset,
              float* out) {
#if E2E_X86
  auto& tile = *reinterpret_cast<__m512(*)[kTileRows][kVectors]>(out);
  switch (engine) {
    case Engine::float32: return tile_float32(rows, columns, words, offset, tile);
    case Engine::bfloat16: return tile_bfloat16(rows, columns, words, offset, tile);
    case Engine::int8: return tile_int8(rows, columns, words, offset, tile);
    case Engine::generic: break;
  }
#else
  (void)engine, (void)offset;
#endif
  tile_generic(rows, columns, words, out);
}

void multiply_above(Engine engine, const uint32_t* rows, const uint32_t* columns, int64_t words, const int32_t* offset,
                    const float* base, const float* slope, const float* unit, uint64_t* above) {
#if E2E_X86
  switch (engine) {
    case Engine::float32: return tile_float32_above(rows, columns, words, offset, base, slope, unit, above);
    case Engine::bfloat16: return tile_bfloat16_above(rows, columns, words, offset, base, slope, unit, above);
    case Engine::int8: return tile_int8_above(rows, columns, words, offset, base, slope, unit, above);
    case Engine::generic: break;
  }
#endif
  alignas(64) float tile[kTileRows * kTileCols];
  multiply(engine, rows, columns, words, offset, tile);
  for (int64_t r = 0; r < kTileRows; ++r) {
    above[r] = 0;
    for (int64_t c = 0; c < kTileCols; ++c) {
      const bool exceeds = !(tile[r * kTileCols + c] <= base[c] + slope[c] * unit[r]);
      above[r] |= static_cast<uint64_t>(exceeds) << c;
    }
  }
}

Words::Words(int64_t count) : data(static_cast<uint32_t*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64 + 64))) {
  if (!data) throw std::bad_alloc();
}

Words::~Words() { std::free(data); }

}  // namespace e2e
