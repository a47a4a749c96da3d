/// Sparse codes on CPU: selection from blocks of scores, gather decode, and the one-pass backward.
/// Matrices are row-major and contiguous. A code has `slots` slots a row; a slot whose value is <= 0 is unused.
#pragma once

#include <cstdint>
#include <vector>

#include "tiles.hpp"

namespace e2e {

/// What an encoder scores: x (rows, depth), weight (features, depth), bias (features) or null. `floor` (features): what
/// a feature's score must exceed, >= 0, for Positives alone; null: 0.
struct Scoring {
  const float *x, *weight, *bias;
  int64_t features, depth;
  const float* floor = nullptr;
};

/// A positive score and its feature.
struct Found {
  float value;
  int32_t index;
};

/// Both sides of the scores in low precision (screen.cpp).
class Packed;

/// A feature that may be selected, with bounds on its score, which are equal once the score is exact.
struct Candidate {
  float upper, lower;
  int32_t index;
};

/// Keeps, for each row, the k ≥ 1 best features of score blocks that arrive feature by feature: N × F scores never
/// exist at once. What is not positive is dropped. Equal scores: the lower feature wins. NaN scores count as the
/// greatest.
class Selection {
 public:
  Selection(int64_t rows, int64_t k) : k_(k), rows_(rows) {}

  /// Scores (rows × columns) of features first … first + columns - 1. Blocks must come in ascending order.
  void add(const float* scores, int64_t columns, int64_t first, int threads);

  /// All features at once: products in low precision (int8 or bfloat16) with a bound on their error, then float32
  /// scores of those whose upper bound reaches the k-th greatest lower bound, so that no winner is lost. Returns false,
  /// with nothing kept, where that cannot pay or hold: numbers that are not finite, or more candidates than one feature
  /// in `share`, judged by the first rows. The first thing to happen to a Selection, and the last.
  bool screen(const Scoring& job, Precision precision, int64_t share, int threads);

  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }

  /// values and indices (rows × slots, slots ≥ k), descending; count (rows).
  void finish(float* values, int32_t* indices, int32_t* count, int64_t slots, int threads);

 private:
  struct Row {
    std::vector<Candidate> kept;
    float threshold = 0;  // nothing <= it can be selected: relu drops what is not positive
    // The greatest lower bounds as keys (see order()), at least the k best of them; of those the least once there are
    // k, which no winner's upper bound lies below; how many candidates to keep before losers are looked for.
    std::vector<int32_t> best;
    int32_t bound = INT32_MIN;
    int64_t room = 0;
  };

  void append(Row& row, const Candidate* found, int64_t count) const;
  void raise_bound(Row& row) const;
  void drop_losers(Row& row) const;
  void keep_best(std::vector<Candidate>& kept) const;
  void rescore(const Scoring& job, int threads);
  void score_first(int64_t count, const Scoring& job, int threads);
  /// A float as an integer of the same order, NaN above everything.
  static int32_t order(float value);
  static bool better(const Candidate& a, const Candidate& b);

  int64_t k_;
  std::vector<Row> rows_;
};

/// Keeps, for each row, every positive score of blocks that arrive feature by feature. NaN scores count as positive.
class Positives {
 public:
  /// `limit`: the most features stored a row, counted beyond; -1 for no limit.
  Positives(int64_t rows, int64_t limit);

  /// As Selection's.
  void add(const float* scores, int64_t columns, int64_t first, int threads);

  /// As Selection's; a candidate is what an upper bound above its floor has, and its float32 score is taken on the
  /// spot.
  bool screen(const Scoring& job, Precision precision, int64_t share, int threads);

  int64_t rows() const { return static_cast<int64_t>(active_.size()); }

  /// Features that are active in the fullest row: the slots needed.
  int64_t fullest() const;

  /// values and indices (rows × slots), ascending in the feature; count (rows), of which `slots` are there.
  void finish(float* values, int32_t* indices, int32_t* count, int64_t slots, int threads) const;

 private:
  /// Consecutive rows, and what they keep: round after round, in each row after row, features ascending.
  struct Block {
    int64_t first, rows;
    std::vector<int32_t> lengths;  // of each row in each round
    std::vector<Found> found;
  };
  void divide(int64_t begin, int64_t end, int64_t block);
  void screen_block(Block& block, const Packed& packed, const Scoring& job);

  int64_t limit_;
  std::vector<int32_t> active_;  // positive scores of each row, stored or not
  std::vector<Block> blocks_;
};

/// Which slots `decode` takes: those of a code (value > 0 or NaN), or those of a gradient (value != 0).
enum class Slots { positive, nonzero };

/// y[n] = bias + Σ_k values[n, k] · s_j · weight[j], j = indices[n, k], s_j = 1 / max(‖weight[j]‖, 1e-12) with
/// `normalize`, else 1; bias may be null. Norms are taken of the rows in use alone. O(N·K·D). Throws
/// std::invalid_argument when an index lies outside [0, features).
void decode(const float* values, const int32_t* indices, int64_t rows, int64_t slots, const float* weight,
            int64_t features, int64_t width, bool normalize, const float* bias, Slots which, float* y, int threads);

/// What the backward pass reads and writes; pointers that are null are left out. N = rows, K = slots, F, D = width.
struct Backward {
  int64_t rows, slots, features, width;
  const float* values;      // (N, K)
  const int32_t* indices;   // (N, K)
  const float* dvalues_in;  // (N, K) or null, entry (n, k) at n · stride_n + k · stride_k
  int64_t stride_n, stride_k;
  const float* g;      // (N, D) gradient of the output, or null
  const float* W_dec;  // (F, D) with g
  const float* x;      // (N, D) or null
  bool normalize;
  float* dW_dec;   // (F, D) or null
  float* dW_enc;   // (F, D) or null
  float* db_enc;   // (F) with dW_enc
  float* dvalues;  // (N, K) or null

  float dvalue_in(int64_t n, int64_t k) const { return dvalues_in ? dvalues_in[n * stride_n + k * stride_k] : 0; }
};

/// One sweep over the transposed code, feature by feature, tokens ascending:
///   dvalues = g·u_j + dvalues_in,  dW_dec[j] = s_j (a - (a·u_j) u_j),  dW_enc[j] = Σ dvalues x,  db_enc[j] = Σ dvalues
/// with a = Σ value g. The result does not depend on `threads`. O(N·K·D + F·D). Throws as `decode` does.
void code_backward(const Backward& job, int threads);

/// Asks the kernel for huge pages under a large fresh buffer: first touching 4 KB pages costs ten times as much as
/// writing them. Linux only; advice, never an error.
void prefer_huge_pages(void* data, int64_t bytes);

/// Lets malloc keep up to `bytes` of freed memory instead of returning it: temporaries of tens of megabytes, made anew
/// for every chunk, otherwise spend half their time in page faults. Process-wide; glibc only, elsewhere nothing
/// happens.
void keep_freed_memory(int64_t bytes);

}  // namespace e2e
