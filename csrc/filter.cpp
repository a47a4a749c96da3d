#include "filter.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "simd.hpp"
#include "threads.hpp"

#if E2E_X86
#include <immintrin.h>
#endif

namespace e2e {

namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // packed rows a job keeps in its core's L2
constexpr float kInf = std::numeric_limits<float>::infinity();

/// Round to nearest even; finite input. Values whose bf16 is subnormal become 0: the bf16 instructions flush them.
uint16_t float_to_bf16(float value) {
  if (std::fabs(value) < 0x1p-126f) return 0;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

const char* row_of(const Quantized& q, int64_t row) {
  return static_cast<const char*>(q.data) + row * q.depth * element_bytes(q.precision);
}

/// Panels of `width` rows of `q`, interleaved word by word; missing rows are zeros.
void pack_panel(const Quantized& q, Engine engine, const int32_t* index, int64_t count, int64_t width, uint32_t flip,
                uint32_t* scratch, uint32_t* panel) {
  const int64_t words = words_per_row(q.precision, engine, q.depth);
  for (int64_t r = 0; r < width; ++r) {
    if (r < count) to_words(q.precision, engine, row_of(q, index[r]), q.depth, scratch);
    pack(r < count ? scratch : nullptr, words, flip, width, r, panel);
  }
}

// ---- what passes the threshold ----

/// Column-side constants of a panel of 48, padded so that missing columns never pass.
struct ColumnPanel {
  alignas(64) float scale[kTileCols], level[kTileCols], price[kTileCols];
};

/// Bit c of mask[r] says that column c passes for row r: acc·row_scale·scale − price > row_level or acc·… > level.
E2E_CLONES
void threshold_generic(const float* tile, int64_t rows, const float* row_scale, const float* row_level,
                       const ColumnPanel& panel, bool absolute, uint64_t* mask) {
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t bits = 0;
    for (int64_t c = 0; c < kTileCols; ++c) {
      const float product = tile[r * kTileCols + c] * row_scale[r] * panel.scale[c];
      const float value = absolute ? std::fabs(product) : product;
      const bool pass = (value - panel.price[c] > row_level[r]) | (value > panel.level[c]);
      bits |= static_cast<uint64_t>(pass) << c;
    }
    mask[r] = bits;
  }
}

#if E2E_X86
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void threshold_avx512(const float* tile, int64_t rows,
                                                                                    const float* row_scale,
                                                                                    const float* row_level,
                                                                                    const ColumnPanel& panel,
                                                                                    bool absolute, uint64_t* mask) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi32(absolute ? 0x7fffffff : -1));
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 scale = _mm512_set1_ps(row_scale[r]), level = _mm512_set1_ps(row_level[r]);
    uint64_t bits = 0;
    for (int64_t v = 0; v < kTileCols / 16; ++v) {
      const __m512 product = _mm512_mul_ps(_mm512_load_ps(tile + r * kTileCols + 16 * v), scale);
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
      : engine_(engine_for(a.precision)),
        a_(a),
        words_(words_per_row(a.precision, engine_, a.depth)),
        panels_((b_count + kTileCols - 1) / kTileCols),
        columns_(panels_ * words_ * kTileCols) {
    if (a.precision != b.precision || a.depth != b.depth)
      throw std::invalid_argument("a and b must be quantized alike");
    parallel_jobs(panels_, threads, [&](int64_t p, int) {
      std::vector<uint32_t> scratch(words_);
      pack_panel(b, engine_, b_index + p * kTileCols, std::min(kTileCols, b_count - p * kTileCols), kTileCols,
                 column_flip(engine_), scratch.data(), columns_.data + p * words_ * kTileCols);
    });
  }

  int64_t words() const { return words_; }
  int64_t panels() const { return panels_; }
  /// Rows whose packed words fit a core's cache, between one tile and 512.
  int64_t cached_rows() const {
    return std::clamp(kBlockBytes / (4 * words_) / kTileRows * kTileRows, kTileRows, int64_t{512});
  }

  /// A job's rows, packed in panels of 8.
  struct Rows {
    Rows(const Panels& panels, int64_t capacity)
        : words(panels.words_ * ((capacity + kTileRows - 1) / kTileRows * kTileRows)),
          offset(capacity + kTileRows),
          scratch(panels.words_) {}
    Words words;
    std::vector<int32_t> offset;
    std::vector<uint32_t> scratch;
  };
  void pack_rows(const int32_t* index, int64_t count, Rows& rows) const {
    for (int64_t r = 0; r < count; r += kTileRows)
      pack_panel(a_, engine_, index + r, std::min(kTileRows, count - r), kTileRows, 0, rows.scratch.data(),
                 rows.words.data + r * words_);
    if (engine_ == Engine::int8)
      for (int64_t r = 0; r < count; ++r)
        rows.offset[r] = int8_offset(reinterpret_cast<const int8_t*>(row_of(a_, index[r])), a_.depth);
  }

  /// tile (8, 48) of row panel r (first row, a multiple of 8) and column panel p.
  void multiply_panel(const Rows& rows, int64_t r, int64_t p, float* tile) const {
    multiply(engine_, rows.words.data + r * words_, columns_.data + p * words_ * kTileCols, words_,
             rows.offset.data() + r, tile);
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
  return std::clamp((even + kTileRows - 1) / kTileRows * kTileRows, kTileRows, panels.cached_rows());
}

}  // namespace

template <class Real>
void row_norms(const Real* x, int64_t rows, int64_t d, double* norm, int threads) {
  constexpr int64_t block = 256;
  parallel_jobs((rows + block - 1) / block, threads, [&](int64_t job, int) {
    for (int64_t i = job * block; i < std::min(rows, (job + 1) * block); ++i) {
      double sum[8] = {};
      for (int64_t k = 0; k < d; ++k)
        sum[k % 8] += static_cast<double>(x[i * d + k]) * static_cast<double>(x[i * d + k]);
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
        put(
            reinterpret_cast<float*>(out), [](double u) { return static_cast<float>(u); },
            [](float v) { return static_cast<double>(v); });
      } else if (precision == Precision::bfloat16) {
        put(
            reinterpret_cast<uint16_t*>(out), [](double u) { return float_to_bf16(static_cast<float>(u)); },
            [](uint16_t v) { return static_cast<double>(bfloat16_to_float(v)); });
      } else {
        scale[i] = static_cast<float>(peak / 127.0);
        const double step = scale[i];
        put(
            reinterpret_cast<int8_t*>(out),
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
    for (int64_t c = 0; c < kTileCols; ++c) {
      const int64_t j = p * kTileCols + c;
      const bool real = j < job.b_count;
      columns[p].scale[c] = real ? job.b.scale[job.b_index[j]] : 1.0f;
      columns[p].level[c] = real && job.col_level ? job.col_level[j] : kInf;
      columns[p].price[c] = !real ? kInf : job.price ? job.price[j] : 0.0f;
    }

  const int64_t block = job.block_rows > 0 ? (job.block_rows + kTileRows - 1) / kTileRows * kTileRows
                                           : job_rows(panels, job.a_count, threads);
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
      for (int64_t r = 0; r < count; r += kTileRows) {
        const int64_t most =
            *std::max_element(job.limit + first + r, job.limit + first + std::min(count, r + kTileRows));
        last[r] = (most + kTileCols - 1) / kTileCols;
      }
    std::vector<int64_t> emitted(count, 0);
    alignas(64) float tile[kTileRows * kTileCols];
    uint64_t mask[kTileRows];
    for (int64_t p = 0; p < panels.panels(); ++p)
      for (int64_t r = 0; r < count; r += kTileRows) {
        if (p >= last[r]) continue;
        const int64_t height = std::min(kTileRows, count - r);
        panels.multiply_panel(packed, r, p, tile);
        threshold(tile, height, row_scale.data() + r, job.row_level + first + r, columns[p], job.absolute, mask);
        for (int64_t k = 0; k < height; ++k)
          for (uint64_t bits = mask[k]; bits; bits &= bits - 1) {
            if (emitted[r + k]++ >= row_cap) continue;
            const int64_t j = p * kTileCols + __builtin_ctzll(bits);
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
            [&](int thread, int64_t first, int64_t count, const std::vector<Pair>& pairs,
                const std::vector<int64_t>& emitted) {
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
  const int64_t width = panels.panels() * kTileCols;
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
    alignas(64) float tile[kTileRows * kTileCols];
    for (int64_t p = 0; p < panels.panels(); ++p)
      for (int64_t r = 0; r < count; r += kTileRows) {
        panels.multiply_panel(packed, r, p, tile);
        for (int64_t k = 0; k < std::min(kTileRows, count - r); ++k)
          for (int64_t c = 0; c < kTileCols; ++c)
            out[(r + k) * width + p * kTileCols + c] = tile[k * kTileCols + c] * scale[p * kTileCols + c];
      }
    for (int64_t r = 0; r < count; ++r) {
      float* row = out + r * width;
      if (absolute)
        for (int64_t j = 0; j < b_count; ++j) row[j] = std::fabs(row[j]);
      std::fill(row + b_count, row + width, -kInf);
      for (int64_t start = groups; start < width; start += groups)
        for (int64_t j = start; j < std::min(width, start + groups); ++j)
          row[j - start] = std::max(row[j - start], row[j]);
      std::nth_element(row, row + rank - 1, row + groups, std::greater<float>());
      level[first + r] = row[rank - 1] * a.scale[first + r];
    }
  });
}

// ---- float64 ----

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
  run_sweep(
      job, row_cap, threads,
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

#define E2E_INSTANTIATE(Real)                                                                                          \
  template double Rows<Real>::cosine(int64_t, int64_t) const;                                                          \
  template void row_norms(const Real*, int64_t, int64_t, double*, int);                                                \
  template void quantize(const Real*, const double*, int64_t, int64_t, Precision, int64_t, void*, float*, double*,     \
                         int);                                                                                         \
  template void exact_cosines(const Rows<Real>&, int64_t, const int64_t*, const int32_t*, double*, int);               \
  template Priced price_rows(const Sweep&, const Rows<Real>&, const double*, const double*, int64_t, int64_t, double*, \
                             int);
E2E_INSTANTIATE(float)
E2E_INSTANTIATE(double)

}  // namespace e2e
