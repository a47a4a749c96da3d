// Selection::screen and Positives::screen: an encoder's candidates from low-precision products, and their float32
// scores.
//
// With xq, wq the stored (int8 or bfloat16) row of x and of W and their scales multiplied back,
//   |x·w - xq·wq|  <=  ‖x - xq‖ ‖w‖ + ‖xq‖ ‖w - wq‖
// Both error norms are measured while rounding, so the bound holds whatever the rows look like. Scores are products of
// register tiles and never reach memory: what does not pass the row's threshold is dropped there.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "simd.hpp"
#include "sparse.hpp"
#include "threads.hpp"
#include "tiles.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace e2e {

/// A row rounded to low precision: scale · stored, the norm of the row, and the norm of what rounding lost.
struct RoundedRow {
  float scale, norm, error;
};

/// What 48 columns contribute to scores and bounds. Missing columns have the bias -infinity: they never pass.
struct ColumnSide {
  alignas(64) float scale[kTileCols], norm[kTileCols], error[kTileCols], bias[kTileCols], slack[kTileCols];
};

// ReLU's test compares the stored rows' product with a limit, everything in units of both scales:
//   xq·wq > - by_norm ‖w‖ - by_error ‖w - wq‖ - (bias - floor + slack)
// Each column brings its norm, its error and -(bias - floor + slack); a tile of rows the greatest of their factors, for
// all of them, and what a row's own unit makes of the bias.
struct ColumnLimit {
  alignas(64) float norm[kTileCols], error[kTileCols], bias[kTileCols];
};
struct TileSide {
  float by_norm = 0, by_error = 0, inverse[kTileRows];
};

// A candidate of ReLU's is one number, kHitRow · row of a block + column of a panel.
constexpr uint32_t kHitRow = 64;
constexpr int64_t kSpare = 4;  // candidates written at once, whether they are there or not

/// Packed rows, tile after tile, and the columns to multiply them with (tiles.hpp).
struct PanelProduct {
  Engine engine;
  const uint32_t *rows, *columns;
  int64_t words;
  const int32_t* offset;
};

/// What a row contributes: the radius of a score is by_norm ‖w‖ + by_error ‖w - wq‖ + slack.
struct RowSide {
  float scale, by_norm, by_error;
};

}  // namespace e2e

#define E2E_KERNELS "screen.inl"
#include "for_each_simd.hpp"

namespace e2e {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // packed rows that a job keeps in its core's L2
constexpr int64_t kFirstRows = 32;          // rows that decide whether screening goes on
constexpr int64_t kFeatures = 64;           // features that a thread rescores at once

/// Rounds x[0, n) into `stored`, which holds n elements.
RoundedRow round_row(Precision precision, const float* x, int64_t n, void* stored) {
  // A float32 sum of n squares in several strands is short by less than (n / 4 + 8) 2^-24 of itself, and each rounding
  // error is itself rounded, by 2^-24 of the entry.
  const float up = 1 + static_cast<float>(n / 4 + 8) * 0x1p-23f;
  float out[3];
  if (precision == Precision::int8) E2E_DISPATCH(row_to_int8, x, n, static_cast<int8_t*>(stored), out);
  else E2E_DISPATCH(row_to_bfloat16, x, n, static_cast<uint16_t*>(stored), out);
  const float norm = up * std::sqrt(out[1]);
  return {out[0], norm, up * std::sqrt(out[2]) + 0x1p-22f * norm};
}

}  // namespace

/// Both sides, rounded and packed for the tiles.
class Packed {
 public:
  Packed(const Scoring& job, int64_t rows, Precision precision, int threads)
      : job_(job),
        precision_(precision),
        engine_(engine_for(precision)),
        depth_((job.depth + 3) / 4 * 4),
        words_(words_per_row(precision, engine_, depth_)),
        panels_((job.features + kTileCols - 1) / kTileCols),
        columns_(panels_ * words_ * kTileCols),
        rows_((rows + kTileRows - 1) / kTileRows * kTileRows * words_),
        column_side_(panels_),
        column_limit_(panels_),
        row_side_(rows + kTileRows),
        tile_side_((rows + kTileRows - 1) / kTileRows),
        offset_(rows + kTileRows) {
    prefer_huge_pages(columns_.data, panels_ * words_ * kTileCols * 4);
    parallel_jobs(panels_, threads, [&](int64_t p, int) { pack_columns(p); });
    parallel_jobs((rows + kTileRows - 1) / kTileRows, threads, [&](int64_t p, int) { pack_rows(p, rows); });
  }

  /// Whether every number is finite, and every norm.
  bool finite() const { return finite_; }
  int64_t panels() const { return panels_; }
  /// Rows that a job takes of `rows`: what its cache holds, fewer where that would leave too few jobs for the threads.
  int64_t job_rows(int64_t rows, int threads) const {
    const int64_t even = (rows + 4 * threads - 1) / (4 * threads), cached = kBlockBytes / (4 * words_);
    return std::clamp((std::min(even, cached) + kTileRows - 1) / kTileRows * kTileRows, kTileRows, int64_t{512});
  }

  /// Candidates of rows r … r + 7 (r a multiple of 8) among the columns of panel p: found[i] of them at hits + 48 i.
  void screen(int64_t r, int64_t height, int64_t p, const float* limit, Candidate* hits, int32_t* found) const {
    alignas(64) float tile[kTileRows * kTileCols];
    multiply_panels(r, p, tile);
    E2E_DISPATCH(screen_tile, tile, height, row_side_.data() + r, column_side_[p], limit,
                 static_cast<int32_t>(p * kTileCols), hits, found);
  }

  /// Of rows first … first + height - 1 (first a multiple of 8) and the columns of panel p those whose score may be
  /// positive, rows counted from `first`. Returns how many; writes up to kSpare more.
  int64_t screen_positive(int64_t first, int64_t height, int64_t p, int32_t* hits) const {
    const PanelProduct product{engine_, rows_.data + first * words_, columns_.data + p * words_ * kTileCols, words_,
                               offset_.data() + first};
    return E2E_DISPATCH(positive_hits, product, height, &tile_side_[first / kTileRows], column_limit_[p], hits);
  }

 private:
  void multiply_panels(int64_t r, int64_t p, float* tile) const {
    multiply(engine_, rows_.data + r * words_, columns_.data + p * words_ * kTileCols, words_, offset_.data() + r,
             tile);
  }

  /// The products of a row or column that was too small to be stored are 0 in any unit.
  static float inverse_of(float scale) { return scale > 0x1p-110f ? 1 / scale : 1; }

  RoundedRow pack_row(const float* x, std::vector<uint32_t>& stored, std::vector<uint32_t>& scratch, uint32_t flip,
                      int64_t width, int64_t place, uint32_t* panel) {
    const RoundedRow row = round_row(precision_, x, job_.depth, stored.data());
    if (!std::isfinite(row.norm) || !std::isfinite(row.error)) finite_ = false;
    to_words(precision_, engine_, stored.data(), depth_, scratch.data());
    pack(scratch.data(), words_, flip, width, place, panel);
    return row;
  }

  void pack_columns(int64_t p) {
    std::vector<uint32_t> stored(depth_), scratch(words_);
    uint32_t* const panel = columns_.data + p * words_ * kTileCols;
    const uint32_t flip = column_flip(engine_);
    ColumnSide& side = column_side_[p];
    ColumnLimit& limit = column_limit_[p];
    for (int64_t c = 0; c < kTileCols; ++c) {
      const int64_t j = p * kTileCols + c;
      if (j >= job_.features) {
        pack(nullptr, words_, flip, kTileCols, c, panel);
        side.scale[c] = side.norm[c] = side.error[c] = side.slack[c] = 0;
        side.bias[c] = -std::numeric_limits<float>::infinity();
        limit.norm[c] = limit.error[c] = 0;
        limit.bias[c] = std::numeric_limits<float>::infinity();
        continue;
      }
      const RoundedRow row = pack_row(job_.weight + j * job_.depth, stored, scratch, flip, kTileCols, c, panel);
      const float bias = job_.bias ? job_.bias[j] : 0;
      const float floor = job_.floor ? job_.floor[j] : 0;
      if (!std::isfinite(bias) || !std::isfinite(floor)) finite_ = false;
      side.scale[c] = row.scale;
      side.norm[c] = row.norm;
      side.error[c] = row.error;
      side.bias[c] = bias;
      side.slack[c] = (std::fabs(bias) + floor) * 0x1p-21f;
      const float inverse = inverse_of(row.scale);
      limit.norm[c] = row.norm * inverse;
      limit.error[c] = row.error * inverse;
      limit.bias[c] = -(bias - floor + side.slack[c]) * inverse;
    }
  }

  void pack_rows(int64_t p, int64_t rows) {
    std::vector<uint32_t> stored(depth_), scratch(words_);
    uint32_t* const panel = rows_.data + p * words_ * kTileRows;
    // Two float32 sums of `depth` products, in any order, are each off by at most depth · 2^-24 ‖x‖ ‖w‖; scaling a
    // tile rounds a few times more.
    const float accumulation = static_cast<float>(job_.depth + 8) * 0x1p-22f;
    TileSide& tile = tile_side_[p];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t r = p * kTileRows + i;
      if (r >= rows) {
        pack(nullptr, words_, 0, kTileRows, i, panel);
        tile.inverse[i] = 1;
        continue;
      }
      const RoundedRow row = pack_row(job_.x + r * job_.depth, stored, scratch, 0, kTileRows, i, panel);
      const float rounded_norm = row.norm + row.error;
      row_side_[r] = {row.scale, 1.0001f * (row.error + accumulation * rounded_norm), 1.0001f * rounded_norm};
      tile.inverse[i] = inverse_of(row.scale);
      tile.by_norm = std::max(tile.by_norm, row_side_[r].by_norm * tile.inverse[i]);
      tile.by_error = std::max(tile.by_error, row_side_[r].by_error * tile.inverse[i]);
      if (precision_ == Precision::int8)
        offset_[r] = int8_offset(reinterpret_cast<const int8_t*>(stored.data()), depth_);
    }
  }

  const Scoring& job_;
  Precision precision_;
  Engine engine_;
  int64_t depth_, words_, panels_;
  Words columns_, rows_;
  std::vector<ColumnSide> column_side_;
  std::vector<ColumnLimit> column_limit_;
  std::vector<RowSide> row_side_;
  std::vector<TileSide> tile_side_;
  std::vector<int32_t> offset_;
  std::atomic<bool> finite_{true};
};

bool Selection::screen(const Scoring& job, Precision precision, int64_t share, int threads) {
  const Packed packed(job, rows(), precision, threads);
  if (!packed.finite()) return false;
  const auto screen_rows = [&](int64_t begin, int64_t end, int64_t block) {
    parallel_jobs((end - begin + block - 1) / block, threads, [&](int64_t chunk, int) {
      const int64_t first = begin + chunk * block, last = std::min(end, first + block);
      std::vector<Candidate> hits(kTileRows * kTileCols);
      int32_t found[kTileRows];
      float limit[kTileRows];
      for (int64_t p = 0; p < packed.panels(); ++p)
        for (int64_t r = first; r < last; r += kTileRows) {
          const int64_t height = std::min(kTileRows, last - r);
          for (int64_t i = 0; i < height; ++i) limit[i] = rows_[r + i].threshold;
          packed.screen(r, height, p, limit, hits.data(), found);
          for (int64_t i = 0; i < height; ++i)
            if (found[i]) append(rows_[r + i], hits.data() + i * kTileCols, found[i]);
        }
      for (int64_t r = first; r < last; ++r) {
        raise_bound(rows_[r]);
        drop_losers(rows_[r]);
      }
    });
  };
  const int64_t trial = std::min(rows(), kFirstRows);
  screen_rows(0, trial, kTileRows);
  int64_t candidates = 0;
  for (int64_t r = 0; r < trial; ++r) candidates += static_cast<int64_t>(rows_[r].kept.size());
  if (candidates * share > trial * job.features) {
    rows_.assign(rows_.size(), Row());
    return false;
  }
  screen_rows(trial, rows(), packed.job_rows(rows() - trial, threads));
  rescore(job, threads);
  return true;
}

/// Replaces bounds by float32 scores and drops what is not positive. The k most promising candidates come first: that
/// raises the threshold by about the bound's radius, and few others are left.
void Selection::rescore(const Scoring& job, int threads) {
  parallel_for(rows(), kTileRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      auto& kept = rows_[r].kept;
      if (static_cast<int64_t>(kept.size()) > k_)
        std::nth_element(kept.begin(), kept.begin() + (k_ - 1), kept.end(), better);
    }
  });
  score_first(k_, job, threads);
  parallel_for(rows(), kTileRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Row& row = rows_[r];
      row.best.clear();
      for (const Candidate& c : row.kept) row.best.push_back(order(c.lower));
      raise_bound(row);
      drop_losers(row);
    }
  });
  score_first(std::numeric_limits<int64_t>::max(), job, threads);
  parallel_for(rows(), kTileRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::erase_if(rows_[r].kept, [](const Candidate& c) { return c.upper <= 0; });
  });
}

/// Scores the first `count` candidates of every row that are not scored yet, feature by feature: a row of the weight is
/// read once.
void Selection::score_first(int64_t count, const Scoring& job, int threads) {
  struct Place {
    int32_t row, slot;
  };
  const auto each = [&](const auto& visit) {
    for (int64_t r = 0; r < rows(); ++r) {
      const auto& kept = rows_[r].kept;
      for (int64_t i = 0; i < std::min<int64_t>(count, kept.size()); ++i)
        if (kept[i].lower < kept[i].upper) visit(kept[i].index, static_cast<int32_t>(r), static_cast<int32_t>(i));
    }
  };
  std::vector<int64_t> start(job.features + 1, 0);
  each([&](int32_t j, int32_t, int32_t) { ++start[j + 1]; });
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<Place> places(start.back());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  each([&](int32_t j, int32_t row, int32_t slot) { places[next[j]++] = {row, slot}; });
  parallel_for(job.features, kFeatures, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t e = start[j]; e < start[j + 1]; ++e) {
        Candidate& c = rows_[places[e].row].kept[places[e].slot];
        const float z =
            E2E_DISPATCH(dot_rows, job.x + places[e].row * job.depth, job.weight + j * job.depth, job.depth);
        c.upper = c.lower = z + (job.bias ? job.bias[j] : 0);
      }
  });
}

bool Positives::screen(const Scoring& job, Precision precision, int64_t share, int threads) {
  const Packed packed(job, rows(), precision, threads);
  if (!packed.finite()) return false;
  const int64_t trial = std::min(rows(), kFirstRows);
  divide(0, trial, kTileRows);
  const int64_t trial_blocks = static_cast<int64_t>(blocks_.size());
  std::atomic<int64_t> candidates{0};
  parallel_jobs(trial_blocks, threads, [&](int64_t b, int) {
    std::vector<int32_t> hits(kTileRows * kTileCols + kSpare);
    for (int64_t p = 0; p < packed.panels(); ++p)
      candidates += packed.screen_positive(blocks_[b].first, blocks_[b].rows, p, hits.data());
  });
  if (candidates * share > trial * job.features) {
    blocks_.clear();
    return false;
  }
  divide(trial, rows(), packed.job_rows(rows() - trial, threads));
  parallel_jobs(static_cast<int64_t>(blocks_.size()), threads,
                [&](int64_t b, int) { screen_block(blocks_[b], packed, job); });
  return true;
}

/// Panel by panel, so that the candidates' rows of the weight are read from a cache.
void Positives::screen_block(Block& block, const Packed& packed, const Scoring& job) {
  const int64_t limit = std::min(limit_, job.features);
  std::vector<int32_t> hits(block.rows * kTileCols + kSpare);
  const float* const x = job.x + block.first * job.depth;
  int32_t* const active = active_.data() + block.first;
  int64_t room = 0;
  std::unique_ptr<Found[]> lists;
  for (int64_t p = 0; p < packed.panels(); ++p) {
    // One place more than a row may fill: scores that are not positive are written too, and not kept.
    const int64_t fullest = std::min<int64_t>(*std::max_element(active, active + block.rows), limit);
    if (fullest + kTileCols >= room) {
      const int64_t wider = 2 * room + 2 * kTileCols;
      std::unique_ptr<Found[]> grown(new Found[block.rows * wider]);
      for (int64_t r = 0; r < block.rows; ++r)
        std::copy_n(lists.get() + r * room, std::min<int64_t>(active[r], limit), grown.get() + r * wider);
      lists = std::move(grown);
      room = wider;
    }
    const int64_t count = packed.screen_positive(block.first, block.rows, p, hits.data()), first = p * kTileCols;
    const Scoring columns{
        x,         job.weight + first * job.depth,         job.bias ? job.bias + first : nullptr, kTileCols,
        job.depth, job.floor ? job.floor + first : nullptr};
    E2E_DISPATCH(score_hits, columns, hits.data(), count, static_cast<int32_t>(first), lists.get(), room,
                 static_cast<int32_t>(limit), active);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    const Found* const row = lists.get() + r * room;
    block.lengths.push_back(static_cast<int32_t>(std::min<int64_t>(active[r], limit)));
    block.found.insert(block.found.end(), row, row + block.lengths.back());
  }
}

}  // namespace e2e
