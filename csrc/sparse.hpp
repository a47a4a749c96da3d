/// Sparse codes on CPU: selection from blocks of scores, gather decode, and the one-pass backward.
/// Matrices are row-major and contiguous. A code has `slots` slots a row; a slot whose value is <= 0 is unused.
#pragma once

#include <cstdint>
#include <vector>

namespace e2e {

/// Everything that bounds the difference between a score from bfloat16 factors and the score from the float32 ones:
///   |x·w - xb·wb| <= ‖x - xb‖ ‖w‖ + ‖xb‖ ‖w - wb‖      (xb, wb: x and w rounded to bfloat16)
/// plus the rounding of two float32 accumulations and of the bfloat16 result. One entry a row of x or of w.
struct Rounding {
  const float* norm;        // ‖row‖
  const float* error_norm;  // ‖row - rounded row‖
};

/// Rounds rows (rows × columns) to bfloat16, to nearest even, and gives both norms of every row, rounded upwards.
void to_bfloat16(const float* x, int64_t rows, int64_t columns, uint16_t* rounded, float* norm, float* error_norm,
                 int threads);

/// Keeps, for each row, the k best features, or every positive one (k = 0), of score blocks that arrive feature by
/// feature: N × F scores never exist at once. Equal scores: the lower feature wins. NaN scores count as the greatest.
class Selection {
 public:
  /// `limit`: without k, the most features stored a row, counted beyond; -1 for no limit.
  Selection(int64_t rows, int64_t k, int64_t limit);

  /// Scores (rows × columns) of features first … first + columns - 1. Blocks must come in ascending order.
  void add(const float* scores, int64_t columns, int64_t first, int threads);

  /// The same from bfloat16 products without bias. A feature is kept while its upper bound reaches the k-th greatest
  /// lower bound (or 0), so no winner is lost. `rescore` must follow. `weight` points at the block's entries.
  void add_screened(const uint16_t* scores, int64_t columns, int64_t first, const float* bias, Rounding x,
                    Rounding weight, int64_t depth, int threads);

  /// Replaces every kept bound by the float32 score x·W[j] + bias[j]; x (rows × depth), weight (F × depth). Scores
  /// that were exact already are left alone.
  void rescore(const float* x, const float* weight, const float* bias, int64_t depth, int threads);

  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }

  /// Entries kept so far, over all rows.
  int64_t kept() const;

  /// Features that are active in the fullest row: the slots needed without k. After `rescore`, if screened.
  int64_t fullest() const;

  /// values and indices (rows × slots), count (rows): descending with k, else ascending in the feature; relu applied.
  void finish(float* values, int32_t* indices, int32_t* count, int64_t slots, int threads);

 private:
  struct Entry {
    float upper, lower;  // equal once the score is exact
    int32_t index;       // the feature, or ~feature while the score is not exact
  };
  struct Row {
    std::vector<Entry> kept;
    float threshold = 0;  // nothing <= it can be selected: relu drops what is not positive
    int64_t active = 0;   // exact positive scores found, stored or not
  };

  template <class Scan>
  void add_segments(int64_t columns, bool exact, int threads, const Scan& scan);
  void compact(Row& row, std::vector<int32_t>& scratch) const;
  void keep_best(std::vector<Entry>& kept) const;
  static bool better(const Entry& a, const Entry& b);

  int64_t k_, limit_;
  std::vector<Row> rows_;
};

/// Which slots `decode` takes: those of a code (value > 0 or NaN), or those of a gradient (value != 0).
enum class Slots { positive, nonzero };

/// y[n] = bias + Σ_k values[n, k] · s_j · weight[j], j = indices[n, k], s_j = 1 / max(‖weight[j]‖, 1e-12) with `normalize`,
/// else 1; bias may be null. Norms are taken of the rows in use alone. O(N·K·D). Throws std::invalid_argument when an
/// index lies outside [0, features).
void decode(const float* values, const int32_t* indices, int64_t rows, int64_t slots, const float* weight,
            int64_t features, int64_t width, bool normalize, const float* bias, Slots which, float* y, int threads);

/// What the backward pass reads and writes; pointers that are null are left out. N = rows, K = slots, F, D = width.
struct Backward {
  int64_t rows, slots, features, width;
  const float* values;     // (N, K)
  const int32_t* indices;  // (N, K)
  const float* dvalues_in; // (N, K) or null
  const float* g;          // (N, D) gradient of the output, or null
  const float* W_dec;      // (F, D) with g
  const float* x;          // (N, D) or null
  bool normalize;
  float* dW_dec;   // (F, D) or null
  float* dW_enc;   // (F, D) or null
  float* db_enc;   // (F) with dW_enc
  float* dvalues;  // (N, K)
};

/// One sweep over the transposed code, feature by feature, tokens ascending:
///   dvalues = g·u_j + dvalues_in,  dW_dec[j] = s_j (a - (a·u_j) u_j),  dW_enc[j] = Σ dvalues x,  db_enc[j] = Σ dvalues
/// with a = Σ value g. The result does not depend on `threads`. O(N·K·D + F·D). Throws as `decode` does.
void code_backward(const Backward& job, int threads);

/// Asks the kernel for huge pages under a large fresh buffer: first touching 4 KB pages costs ten times as much as
/// writing them. Linux only; advice, never an error.
void prefer_huge_pages(void* data, int64_t bytes);

/// Lets malloc keep up to `bytes` of freed memory instead of returning it: temporaries of tens of megabytes, made anew
/// for every chunk, otherwise spend half their time in page faults. Process-wide; glibc only, elsewhere nothing happens.
void keep_freed_memory(int64_t bytes);

}  // namespace e2e
