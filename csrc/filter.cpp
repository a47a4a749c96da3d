#include "filter.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "threads.hpp"
#include "simd.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define E2E_X86 1
#define E2E_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define E2E_X86 0
#define E2E_CLONES
#endif

namespace e2e {

namespace {

constexpr int64_t kRows = 8;         // rows of a register tile
constexpr int64_t kVectors = 3;      // its columns, in vectors of 16
constexpr int64_t kCols = 16 * kVectors;
constexpr int64_t kBlockBytes = 384 << 10;  // packed rows a job keeps in its core's L2
constexpr float kInf = std::numeric_limits<float>::infinity();

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

/// Round to nearest even; finite input. Values whose bf16 is subnormal become 0: the bf16 instructions flush them.
uint16_t float_to_bf16(float value) {
  if (std::fabs(value) < 0x1p-126f) return 0;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/// 64-byte aligned words.
struct Words {
  explicit Words(int64_t count) : data(static_cast<uint32_t*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64 + 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Words() { std::free(data); }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  uint32_t* data;
};

/// How a tile is multiplied. A word is what one lane consumes a step: one float, two bf16 or four int8.
enum class Engine { generic, float32, bfloat16, int8 };

Engine engine_for(Precision precision) {
  if (!native(precision)) return Engine::generic;
  switch (precision) {
    case Precision::bfloat16: return Engine::bfloat16;
    case Precision::int8: return Engine::int8;
    default: return simd_level() == Simd::avx512 ? Engine::float32 : Engine::generic;
  }
}

int64_t words_per_row(const Quantized& q, Engine engine) {
  return engine == Engine::generic ? q.depth : q.depth * element_bytes(q.precision) / 4;
}

/// One row as the engine's words.
void load_words(const Quantized& q, Engine engine, int64_t row, uint32_t* out) {
  const char* source = static_cast<const char*>(q.data) + row * q.depth * element_bytes(q.precision);
  if (engine != Engine::generic || q.precision == Precision::float32) {
    std::memcpy(out, source, q.depth * element_bytes(q.precision));
    return;
  }
  float* value = reinterpret_cast<float*>(out);
  if (q.precision == Precision::bfloat16) {
    const auto* bits = reinterpret_cast<const uint16_t*>(source);
    for (int64_t k = 0; k < q.depth; ++k) value[k] = bf16_to_float(bits[k]);
  } else {
    const auto* level = reinterpret_cast<const int8_t*>(source);
    for (int64_t k = 0; k < q.depth; ++k) value[k] = level[k];
  }
}

/// Panels of `width` rows, interleaved word by word; missing rows are zeros. For int8, `flip` turns the stored signed
/// bytes into unsigned ones (x + 128), as the instruction wants for its first operand.
void pack_panel(const Quantized& q, Engine engine, const int32_t* index, int64_t count, int64_t width, bool flip,
                uint32_t* scratch, uint32_t* panel) {
  const int64_t words = words_per_row(q, engine);
  const uint32_t mask = flip && engine == Engine::int8 ? 0x80808080u : 0;
  for (int64_t r = 0; r < width; ++r) {
    if (r < count) {
      load_words(q, engine, index[r], scratch);
      for (int64_t k = 0; k < words; ++k) panel[k * width + r] = scratch[k] ^ mask;
    } else {
      for (int64_t k = 0; k < words; ++k) panel[k * width + r] = mask;
    }
  }
}

/// −128 Σ_k a_k: undoes the + 128 of the other operand.
int32_t int8_offset(const Quantized& q, int64_t row) {
  const auto* level = static_cast<const int8_t*>(q.data) + row * q.depth;
  return -128 * std::accumulate(level, level + q.depth, 0);
}

// ---- the register tile: out (8, 48) = rows · columns ---------------------------------------------------------------

/// Plain C++ for any processor, over float words; the compiler vectorises the inner loop.
E2E_CLONES
void tile_generic(const uint32_t* a_words, const uint32_t* b_words, int64_t words, float* out) {
  const auto* a = reinterpret_cast<const float*>(a_words);
  const auto* b = reinterpret_cast<const float*>(b_words);
  for (int64_t r0 = 0; r0 < kRows; r0 += 4)
    for (int64_t c0 = 0; c0 < kCols; c0 += 16) {
      float acc[4][16] = {};
      for (int64_t k = 0; k < words; ++k)
        for (int r = 0; r < 4; ++r)
          for (int c = 0; c < 16; ++c) acc[r][c] += a[k * kRows + r0 + r] * b[k * kCols + c0 + c];
      for (int r = 0; r < 4; ++r) std::memcpy(out + (r0 + r) * kCols + c0, acc[r], sizeof acc[r]);
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

#define E2E_TILE(NAME, STEP, TARGET)                                                                              \
  __attribute__((target(TARGET))) void NAME(const uint32_t* a, const uint32_t* b, int64_t words,                  \
                                            const int32_t* offset, __m512 (&out)[kRows][kVectors]) {              \
    STEP::Acc acc[kRows][kVectors];                                                                               \
    _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r)                                                       \
        _Pragma("GCC unroll 3") for (int v = 0; v < kVectors; ++v) acc[r][v] = STEP::zero();                       \
    for (int64_t k = 0; k < words; ++k, a += kRows, b += kCols) {                                                 \
      const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 16), b2 = _mm512_load_si512(b + 32);    \
      _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {                                                   \
        acc[r][0] = STEP::step(acc[r][0], a + r, b0);                                                             \
        acc[r][1] = STEP::step(acc[r][1], a + r, b1);                                                             \
        acc[r][2] = STEP::step(acc[r][2], a + r, b2);                                                             \
      }                                                                                                           \
    }                                                                                                             \
    _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r)                                                       \
        _Pragma("GCC unroll 3") for (int v = 0; v < kVectors; ++v) out[r][v] = STEP::result(acc[r][v], offset[r]); \
  }
E2E_TILE(tile_float32, FloatStep, E2E_TARGET)
E2E_TILE(tile_bfloat16, Bf16Step, E2E_TARGET ",avx512bf16")
E2E_TILE(tile_int8, Int8Step, E2E_TARGET ",avx512vnni")
#endif

/// out (8, 48): the products of a packed row panel and a packed column panel, before the int8 scales.
void multiply(Engine engine, const uint32_t* a, const uint32_t* b, int64_t words, const int32_t* offset, float* out) {
#if E2E_X86
  auto& tile = *reinterpret_cast<__m512(*)[kRows][kVectors]>(out);
  switch (engine) {
    case Engine::float32: return tile_float32(a, b, words, offset, tile);
    case Engine::bfloat16: return tile_bfloat16(a, b, words, offset, tile);
    case Engine::int8: return tile_int8(a, b, words, offset, tile);
    case Engine::generic: break;
  }
#else
  (void)engine, (void)offset;
#endif
  tile_generic(a, b, words, out);
}

// ---- what passes the threshold -------------------------------------------------------------------------------------

/// Column-side constants of a panel of 48, padded so that missing columns never pass.
struct ColumnPanel {
  alignas(64) float scale[kCols], level[kCols], price[kCols];
};

/// Bit c of mask[r] says that column c passes for row r: acc·row_scale·scale − price > row_level or acc·… > level.
E2E_CLONES
void threshold_generic(const float* tile, int64_t rows, const float* row_scale, const float* row_level,
                       const ColumnPanel& panel, bool absolute, uint64_t* mask) {
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t bits = 0;
    for (int64_t c = 0; c < kCols; ++c) {
      const float product = tile[r * kCols + c] * row_scale[r] * panel.scale[c];
      const float value = absolute ? std::fabs(product) : product;
      const bool pass = (value - panel.price[c] > row_level[r]) | (value > panel.level[c]);
      bits |= static_cast<uint64_t>(pass) << c;
    }
    mask[r] = bits;
  }
}

#if E2E_X86
__attribute__((target(E2E_TARGET))) void threshold_avx512(const float* tile, int64_t rows, const float* row_scale,
                                                          const float* row_level, const ColumnPanel& panel,
                                                          bool absolute, uint64_t* mask) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi32(absolute ? 0x7fffffff : -1));
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 scale = _mm512_set1_ps(row_scale[r]), level = _mm512_set1_ps(row_level[r]);
    uint64_t bits = 0;
    for (int64_t v = 0; v < kVectors; ++v) {
      const __m512 product = _mm512_mul_ps(_mm512_load_ps(tile + r * kCols + 16 * v), scale);
      const __m512 value = _mm512_and_ps(_mm512_mul_ps(product, _mm512_load_ps(panel.scale + 16 * v)), sign);
      const __mmask16 by_row =
          _mm512_cmp_ps_mask(_mm512_sub_ps(value, _mm512_load_ps(panel.price + 16 * v)), level, _CMP_GT_OQ);
      const __mmask16 by_col = _mm512_cmp_ps_mask(value, _mm512_load_ps(panel.level + 16 * v), _CMP_GT_OQ);
      bits |= static_cast<uint64_t>(by_row | by_col) << (16 * v);
    }
    mask[r] = bits;
  }
}
#endif

void threshold(const float* tile, int64_t rows, const float* row_scale, const float* row_level,
               const ColumnPanel& panel, bool absolute, uint64_t* mask) {
#if E2E_X86
  if (simd_level() == Simd::avx512) return threshold_avx512(tile, rows, row_scale, row_level, panel, absolute, mask);
#endif
  threshold_generic(tile, rows, row_scale, row_level, panel, absolute, mask);
}

/// Both sides packed for a run of tiles: all columns once, and a job's rows when it starts.
class Panels {
 public:
  Panels(const Quantized& a, const Quantized& b, const int32_t* b_index, int64_t b_count, int threads)
      : engine_(engine_for(a.precision)), a_(a), words_(words_per_row(a, engine_)), panels_((b_count + kCols - 1) / kCols),
        columns_(panels_ * words_ * kCols) {
    if (a.precision != b.precision || a.depth != b.depth)
      throw std::invalid_argument("a and b must be quantized alike");
    parallel_jobs(panels_, threads, [&](int64_t p, int) {
      std::vector<uint32_t> scratch(words_);
      pack_panel(b, engine_, b_index + p * kCols, std::min(kCols, b_count - p * kCols), kCols, true, scratch.data(),
                 columns_.data + p * words_ * kCols);
    });
  }

  int64_t words() const { return words_; }
  int64_t panels() const { return panels_; }
  /// Rows whose packed words fit a core's cache, between one tile and 512.
  int64_t cached_rows() const { return std::clamp(kBlockBytes / (4 * words_) / kRows * kRows, kRows, int64_t{512}); }

  /// A job's rows, packed in panels of 8.
  struct Rows {
    Rows(const Panels& panels, int64_t capacity)
        : words(panels.words_ * ((capacity + kRows - 1) / kRows * kRows)), offset(capacity + kRows), scratch(panels.words_) {}
    Words words;
    std::vector<int32_t> offset;
    std::vector<uint32_t> scratch;
  };
  void pack_rows(const int32_t* index, int64_t count, Rows& rows) const {
    for (int64_t r = 0; r < count; r += kRows)
      pack_panel(a_, engine_, index + r, std::min(kRows, count - r), kRows, false, rows.scratch.data(),
                 rows.words.data + r * words_);
    if (engine_ == Engine::int8)
      for (int64_t r = 0; r < count; ++r) rows.offset[r] = int8_offset(a_, index[r]);
  }

  /// tile (8, 48) of row panel r (first row, a multiple of 8) and column panel p.
  void multiply_panel(const Rows& rows, int64_t r, int64_t p, float* tile) const {
    multiply(engine_, rows.words.data + r * words_, columns_.data + p * words_ * kCols, words_, rows.offset.data() + r,
             tile);
  }

 private:
  Engine engine_;
  Quantized a_;
  int64_t words_, panels_;
  Words columns_;
};

/// Rows a job takes: what fits the cache, less when there would be too few jobs for the threads.
int64_t job_rows(const Panels& panels, int64_t rows, int threads) {
  const int64_t even = (rows + 4 * threads - 1) / (4 * threads);
  return std::clamp((even + kRows - 1) / kRows * kRows, kRows, panels.cached_rows());
}

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

template <class Real>
void row_norms(const Real* x, int64_t rows, int64_t d, double* norm, int threads) {
  constexpr int64_t block = 256;
  parallel_jobs((rows + block - 1) / block, threads, [&](int64_t job, int) {
    for (int64_t i = job * block; i < std::min(rows, (job + 1) * block); ++i) {
      double sum[8] = {};
      for (int64_t k = 0; k < d; ++k) sum[k % 8] += static_cast<double>(x[i * d + k]) * static_cast<double>(x[i * d + k]);
      norm[i] = std::sqrt(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
    }
  });
}

template <class Real>
void quantize(const Real* x, const double* norm, int64_t rows, int64_t d, Precision precision, int64_t depth,
              void* data, float* scale, double* error, int threads) {
  if (depth < d || depth % 4) throw std::invalid_argument("depth must be a multiple of 4 and at least d");
  constexpr int64_t block = 256;
  parallel_jobs((rows + block - 1) / block, threads, [&](int64_t job, int) {
    std::vector<double> unit(d);
    for (int64_t i = job * block; i < std::min(rows, (job + 1) * block); ++i) {
      char* out = static_cast<char*>(data) + i * depth * element_bytes(precision);
      std::memset(out, 0, depth * element_bytes(precision));
      scale[i] = 1.0f;
      error[i] = 0.0;
      if (norm[i] == 0.0) continue;
      double peak = 0.0;
      for (int64_t k = 0; k < d; ++k) {
        unit[k] = static_cast<double>(x[i * d + k]) / norm[i];
        peak = std::max(peak, std::fabs(unit[k]));
      }
      double squares = 0.0;
      const auto put = [&](auto* target, auto&& convert, auto&& back) {
        for (int64_t k = 0; k < d; ++k) {
          target[k] = convert(unit[k]);
          const double miss = back(target[k]) - unit[k];
          squares += miss * miss;
        }
      };
      if (precision == Precision::float32) {
        put(reinterpret_cast<float*>(out), [](double u) { return static_cast<float>(u); },
            [](float v) { return static_cast<double>(v); });
      } else if (precision == Precision::bfloat16) {
        put(reinterpret_cast<uint16_t*>(out), [](double u) { return float_to_bf16(static_cast<float>(u)); },
            [](uint16_t v) { return static_cast<double>(bf16_to_float(v)); });
      } else {
        scale[i] = static_cast<float>(peak / 127.0);
        const double step = scale[i];
        put(reinterpret_cast<int8_t*>(out),
            [&](double u) { return static_cast<int8_t>(std::clamp(std::nearbyint(u / step), -127.0, 127.0)); },
            [&](int8_t v) { return step * v; });
      }
      // The relative error of summing d squares in float64 is far below 1e-9 for any d in use.
      error[i] = std::sqrt(squares) * (1.0 + 1e-9) + 1e-15;
    }
  });
}

namespace {

/// Runs a sweep; done(thread, first, count, pairs, emitted) gets the pairs of rows first..first + count, row by row in
/// no order, and how many each row passed, of which at most row_cap are there.
template <class Done>
void run_sweep(const Sweep& job, int64_t row_cap, int threads, Done&& done) {
  if (job.a_count == 0 || job.b_count == 0) return;
  const Panels panels(job.a, job.b, job.b_index, job.b_count, threads);
  std::vector<ColumnPanel> columns(panels.panels());
  for (int64_t p = 0; p < panels.panels(); ++p)
    for (int64_t c = 0; c < kCols; ++c) {
      const int64_t j = p * kCols + c;
      const bool real = j < job.b_count;
      columns[p].scale[c] = real ? job.b.scale[job.b_index[j]] : 1.0f;
      columns[p].level[c] = real && job.col_level ? job.col_level[j] : kInf;
      columns[p].price[c] = !real ? kInf : job.price ? job.price[j] : 0.0f;
    }

  const int64_t block = job.block_rows > 0 ? (job.block_rows + kRows - 1) / kRows * kRows : job_rows(panels, job.a_count, threads);
  std::vector<std::vector<Pair>> found(threads);
  std::vector<std::unique_ptr<Panels::Rows>> rows(threads);
  for (auto& r : rows) r = std::make_unique<Panels::Rows>(panels, block);

  parallel_jobs((job.a_count + block - 1) / block, threads, [&](int64_t chunk, int thread) {
    const int64_t first = chunk * block, count = std::min(block, job.a_count - first);
    Panels::Rows& packed = *rows[thread];
    panels.pack_rows(job.a_index + first, count, packed);
    std::vector<float> row_scale(count);
    for (int64_t r = 0; r < count; ++r) row_scale[r] = job.a.scale[job.a_index[first + r]];
    std::vector<int64_t> last(count, panels.panels());  // panels that a group of 8 rows visits
    if (job.limit)
      for (int64_t r = 0; r < count; r += kRows) {
        const int64_t most = *std::max_element(job.limit + first + r, job.limit + first + std::min(count, r + kRows));
        last[r] = (most + kCols - 1) / kCols;
      }
    std::vector<int64_t> emitted(count, 0);
    alignas(64) float tile[kRows * kCols];
    uint64_t mask[kRows];
    for (int64_t p = 0; p < panels.panels(); ++p)
      for (int64_t r = 0; r < count; r += kRows) {
        if (p >= last[r]) continue;
        const int64_t height = std::min(kRows, count - r);
        panels.multiply_panel(packed, r, p, tile);
        threshold(tile, height, row_scale.data() + r, job.row_level + first + r, columns[p], job.absolute, mask);
        for (int64_t k = 0; k < height; ++k)
          for (uint64_t bits = mask[k]; bits; bits &= bits - 1) {
            if (emitted[r + k]++ >= row_cap) continue;
            const int64_t j = p * kCols + __builtin_ctzll(bits);
            found[thread].push_back({job.a_index[first + r + k], job.b_index[j]});
          }
      }
    done(thread, first, count, found[thread], emitted);
    found[thread].clear();
  });
}

}  // namespace

std::vector<Pair> sweep(const Sweep& job, int64_t row_cap, uint8_t* capped, int threads) {
  std::vector<std::vector<Pair>> all(threads);
  run_sweep(job, row_cap, threads,
            [&](int thread, int64_t first, int64_t count, const std::vector<Pair>& pairs, const std::vector<int64_t>& emitted) {
              all[thread].insert(all[thread].end(), pairs.begin(), pairs.end());
              for (int64_t r = 0; r < count; ++r) capped[first + r] = emitted[r] > row_cap;
            });
  for (int t = 1; t < threads; ++t) {
    all[0].insert(all[0].end(), all[t].begin(), all[t].end());
    std::vector<Pair>().swap(all[t]);
  }
  return std::move(all[0]);
}

void row_levels(const Quantized& a, const Quantized& b, const int32_t* b_index, int64_t b_count, int64_t rank,
                bool absolute, float* level, int threads) {
  if (rank < 1 || rank > b_count) throw std::invalid_argument("rank must lie in [1, b_count]");
  const Panels panels(a, b, b_index, b_count, threads);
  const int64_t width = panels.panels() * kCols;
  const int64_t groups = std::min(width, std::max<int64_t>(4 * 16, (16 * rank + 15) / 16 * 16));
  const int64_t block = std::min<int64_t>(job_rows(panels, a.rows, threads), 128);
  std::vector<float> scale(width, 1.0f);
  for (int64_t j = 0; j < b_count; ++j) scale[j] = b.scale[b_index[j]];
  std::vector<int32_t> index(a.rows);
  std::iota(index.begin(), index.end(), 0);
  std::vector<std::unique_ptr<Panels::Rows>> rows(threads);
  for (auto& r : rows) r = std::make_unique<Panels::Rows>(panels, block);
  std::vector<std::vector<float>> products(threads, std::vector<float>(block * width));

  parallel_jobs((a.rows + block - 1) / block, threads, [&](int64_t chunk, int thread) {
    const int64_t first = chunk * block, count = std::min(block, a.rows - first);
    Panels::Rows& packed = *rows[thread];
    panels.pack_rows(index.data() + first, count, packed);
    float* out = products[thread].data();
    alignas(64) float tile[kRows * kCols];
    for (int64_t p = 0; p < panels.panels(); ++p)
      for (int64_t r = 0; r < count; r += kRows) {
        panels.multiply_panel(packed, r, p, tile);
        for (int64_t k = 0; k < std::min(kRows, count - r); ++k)
          for (int64_t c = 0; c < kCols; ++c)
            out[(r + k) * width + p * kCols + c] = tile[k * kCols + c] * scale[p * kCols + c];
      }
    for (int64_t r = 0; r < count; ++r) {
      float* row = out + r * width;
      if (absolute)
        for (int64_t j = 0; j < b_count; ++j) row[j] = std::fabs(row[j]);
      std::fill(row + b_count, row + width, -kInf);
      for (int64_t start = groups; start < width; start += groups)
        for (int64_t j = start; j < std::min(width, start + groups); ++j) row[j - start] = std::max(row[j - start], row[j]);
      std::nth_element(row, row + rank - 1, row + groups, std::greater<float>());
      level[first + r] = row[rank - 1] * a.scale[first + r];
    }
  });
}

// ---- float64 -------------------------------------------------------------------------------------------------------

namespace {

/// Σ a_k b_k in float64, sixteen partial sums in a fixed order.
template <class Real>
__attribute__((always_inline)) inline double dot_in_order(const Real* a, const Real* b, int64_t d) {
  double sum[16] = {};
  int64_t k = 0;
  for (; k + 16 <= d; k += 16)
    for (int l = 0; l < 16; ++l) sum[l] += static_cast<double>(a[k + l]) * static_cast<double>(b[k + l]);
  for (; k < d; ++k) sum[k % 16] += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  return sum[0];
}
E2E_CLONES double dot(const float* a, const float* b, int64_t d) { return dot_in_order(a, b, d); }
E2E_CLONES double dot(const double* a, const double* b, int64_t d) { return dot_in_order(a, b, d); }

}  // namespace

template <class Real>
double Rows<Real>::cosine(int64_t i, int64_t j) const {
  const double scale = a_norm[i] * b_norm[j];
  const double value = scale == 0.0 ? 0.0 : dot(a + i * d, b + j * d, d) / scale;
  return absolute ? std::fabs(value) : value;
}

template <class Real>
void exact_cosines(const Rows<Real>& exact, int64_t rows, const int64_t* start, const int32_t* col, double* value,
                   int threads) {
  // A job's edges are taken in the order of their columns: b is then read once a job, in order, and a job's rows of a
  // stay in the last-level cache.
  constexpr int64_t cached = int64_t{6} << 20;
  const int64_t fit = std::max<int64_t>(cached / static_cast<int64_t>(sizeof(Real) * exact.d), 1);
  const int64_t block = std::clamp<int64_t>(rows / (4 * threads), 1, fit);
  struct Edge {
    int32_t row, col;
    int64_t at;
  };
  parallel_jobs((rows + block - 1) / block, threads, [&](int64_t job, int) {
    const int64_t first = job * block, last = std::min(rows, first + block);
    std::vector<Edge> edges;
    edges.reserve(start[last] - start[first]);
    for (int64_t i = first; i < last; ++i)
      for (int64_t e = start[i]; e < start[i + 1]; ++e) edges.push_back({static_cast<int32_t>(i), col[e], e});
    std::sort(edges.begin(), edges.end(), [](const Edge& x, const Edge& y) { return x.col < y.col; });
    for (const Edge& edge : edges) value[edge.at] = exact.cosine(edge.row, edge.col);
  });
}

template <class Real>
Priced price_rows(const Sweep& job, const Rows<Real>& exact, const double* keep_level, const double* exact_price,
                  int64_t keep, int64_t row_cap, double* bound, int threads) {
  struct Kept {
    double net, value;
    Pair pair;
  };
  std::vector<Priced> all(threads);
  run_sweep(job, row_cap, threads,
            [&](int thread, int64_t first, int64_t count, std::vector<Pair>& pairs, const std::vector<int64_t>& emitted) {
              std::vector<std::vector<Kept>> kept(count);
                          // Pairs carry indices into a; the job's rows need not be in order.
              std::vector<std::pair<int32_t, int32_t>> place(count);
              for (int64_t r = 0; r < count; ++r) place[r] = {job.a_index[first + r], static_cast<int32_t>(r)};
              std::sort(place.begin(), place.end());
              for (const Pair& pair : pairs) {
                const int64_t r = std::lower_bound(place.begin(), place.end(), std::pair(pair.row, int32_t{0}))->second;
                const double value = exact.cosine(pair.row, pair.col), net = value - exact_price[pair.col];
                if (net > keep_level[first + r]) kept[r].push_back({net, value, pair});
              }
              for (int64_t r = 0; r < count; ++r) {
                auto& row = kept[r];
                bound[first + r] = emitted[r] > row_cap ? std::numeric_limits<double>::infinity() : keep_level[first + r];
                if (static_cast<int64_t>(row.size()) > keep) {
                  std::nth_element(row.begin(), row.begin() + keep - 1, row.end(), [](const Kept& x, const Kept& y) {
                    return x.net != y.net ? x.net > y.net : x.pair.col < y.pair.col;
                  });
                  bound[first + r] = std::max(bound[first + r], row[keep - 1].net);
                  row.resize(keep);
                }
                for (const Kept& k : row) {
                  all[thread].pair.push_back(k.pair);
                  all[thread].value.push_back(k.value);
                }
              }
            });
  for (int t = 1; t < threads; ++t) {
    all[0].pair.insert(all[0].pair.end(), all[t].pair.begin(), all[t].pair.end());
    all[0].value.insert(all[0].value.end(), all[t].value.begin(), all[t].value.end());
  }
  return std::move(all[0]);
}

#define E2E_INSTANTIATE(Real)                                                                                        \
  template double Rows<Real>::cosine(int64_t, int64_t) const;                                                        \
  template void row_norms(const Real*, int64_t, int64_t, double*, int);                                              \
  template void quantize(const Real*, const double*, int64_t, int64_t, Precision, int64_t, void*, float*, double*,   \
                         int);                                                                                       \
  template void exact_cosines(const Rows<Real>&, int64_t, const int64_t*, const int32_t*, double*, int);             \
  template Priced price_rows(const Sweep&, const Rows<Real>&, const double*, const double*, int64_t, int64_t,        \
                             double*, int);
E2E_INSTANTIATE(float)
E2E_INSTANTIATE(double)

}  // namespace e2e
