/// Low-precision sweeps over all pairs of rows of two matrices: which pairs may matter, never the n×m matrix itself.
///
/// A sweep multiplies 8×48 tiles in registers and emits the pairs that pass a threshold. What it computes is only a
/// filter: quantize() measures how far each stored row lies from the true unit row, so that by Cauchy and Schwarz the
/// caller bounds every product's error, and exact_cosines() recomputes in float64 whatever was emitted.
#pragma once

#include <cstdint>
#include <vector>

#include "tiles.hpp"

namespace e2e {

/// Unit rows in low precision, row-major; `depth` is padded with zeros to a multiple of 4.
struct Quantized {
  Precision precision;
  int64_t rows, depth;
  const void* data;    // (rows, depth)
  const float* scale;  // (rows,) value = scale · stored; ones unless int8
};

/// data[i] ≈ x[i] / norm[i], scale[i], and error[i] ≥ ‖scale[i]·data[i] − x[i]/norm[i]‖₂; rows of norm 0 become zeros.
/// x is (rows, d) float or double, depth ≥ d a multiple of 4. O(rows·d).
template <class Real>
void quantize(const Real* x, const double* norm, int64_t rows, int64_t d, Precision precision, int64_t depth,
              void* data, float* scale, double* error, int threads);

/// Euclidean norm of each row of x (rows, d), accumulated in float64. NaN and infinity pass through.
template <class Real>
void row_norms(const Real* x, int64_t rows, int64_t d, double* norm, int threads);

struct Pair {
  int32_t row, col;
};

/// One sweep: of rows a_index[0..a_count) of `a` and rows b_index[0..b_count) of `b`, those pairs with
///     acc − price[j] > row_level[i]   or   acc > col_level[j],
/// acc the float32 product of the stored rows. Levels and prices go by position in the index lists; null col_level and
/// price mean +∞ and 0. Row position i is compared with the first limit[i] columns alone (null: all).
struct Sweep {
  Quantized a, b;
  const int32_t* a_index;
  int64_t a_count;
  const int32_t* b_index;
  int64_t b_count;
  const float* row_level;
  const float* col_level;
  const float* price;
  const int64_t* limit;
  bool absolute;       // take |acc|: similarity regardless of sign
  int64_t block_rows;  // rows of `a` a job takes; 0: as many as fit the cache. The pairs do not depend on it.
};

/// The pairs of a sweep, as indices into a and b, in no particular order. `row_cap` bounds what one row may emit: a row
/// that passes it has `capped[position] = 1` and an incomplete list. O(a_count · b_count · depth).
std::vector<Pair> sweep(const Sweep& job, int64_t row_cap, uint8_t* capped, int threads);

/// For each row i of `a`, about the rank-th largest product with the rows b_index of `b`: exact while b_count ≤
/// 16·rank, else the rank-th largest of 16·rank (at least 64) group maxima, which is at most that. level is (a.rows,).
void row_levels(const Quantized& a, const Quantized& b, const int32_t* b_index, int64_t b_count, int64_t rank,
                bool absolute, float* level, int threads);

/// Two matrices as given, (rows, d), with their rows' norms.
template <class Real>
struct Rows {
  const Real *a, *b;
  const double *a_norm, *b_norm;
  int64_t d;
  bool absolute;

  /// Cosine (its absolute value if so asked) of a[i] and b[j] in float64, 0 where a norm is 0. One fixed order of
  /// summation: it depends on the two rows alone.
  double cosine(int64_t i, int64_t j) const;
};

/// value[e] = cosine of row i and column col[e] for the edges of compressed sparse rows. O(edges · d).
template <class Real>
void exact_cosines(const Rows<Real>& exact, int64_t rows, const int64_t* start, const int32_t* col, double* value,
                   int threads);

/// What a pricing sweep keeps.
struct Priced {
  std::vector<Pair> pair;
  std::vector<double> value;  // their cosines
};

/// A sweep whose pairs are at once recomputed in float64: of row position i, the pairs with cosine − exact_price[j] >
/// keep_level[i] are kept, at most `keep` of the best. bound[i] ≥ cosine − exact_price[j] for every pair of the row
/// that was emitted and not kept: keep_level[i], or the worst kept where `keep` cut, or +∞ where row_cap did.
/// exact_price goes by column of b.
template <class Real>
Priced price_rows(const Sweep& job, const Rows<Real>& exact, const double* keep_level, const double* exact_price,
                  int64_t keep, int64_t row_cap, double* bound, int threads);

}  // namespace e2e
