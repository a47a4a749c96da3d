/// Sparse linear assignment, maximising: every row to one column of its own, exact, with dual prices.
///
/// With prices p_j and u_i = max_j (s_ij − p_j) over row i's edges, any complete matching totals at most Σ u + Σ p (for
/// rows < cols: when p ≥ 0). A matching that uses only tight edges (s_ij − p_j = u_i), and leaves unmatched only
/// columns of price 0 when rows < cols, attains it: it is optimal.
///
/// Method: an ε-scaling auction (Bertsekas 1988) brings prices near the optimum; rows whose edge is exactly tight keep
/// it, the others are matched by shortest augmenting paths (Jonker and Volgenant 1987), which end exact in float64: no
/// ε remains. For rows < cols, where an auction's prices would strand unmatched columns above 0, the start is
/// augmenting row reduction from zero prices.
#pragma once

#include <cstdint>
#include <vector>

#include "filter.hpp"

namespace e2e {

/// Compressed sparse rows, rows ≤ cols: row i's edges are start[i]..start[i + 1).
struct Graph {
  int64_t rows, cols;
  const int64_t* start;  // (rows + 1,)
  const int32_t* col;
  const double* value;
};

/// A matching with its prices, and what it took.
struct Assignment {
  std::vector<int32_t> col_of_row, row_of_col;  // −1: unmatched
  std::vector<double> price;                    // (cols,)
  int64_t bids = 0, pops = 0;                   // auction bids; columns scanned by the shortest paths
};

/// Throws std::invalid_argument, naming the place, unless starts ascend, columns lie in range, rows ≤ cols and every
/// value is finite. O(edges).
void check_graph(const Graph& graph);

/// The optimum from scratch. `bids_per_row` bounds the auction, not the result. Throws std::invalid_argument when no
/// matching covers all rows.
Assignment assign(const Graph& graph, int64_t bids_per_row = 300);

/// The optimum again after edges were added: from the old prices when rows == cols (they only rise; a short auction
/// first where many rows lost their column), from scratch otherwise, where a freed column's price would have to fall.
void reassign(const Graph& graph, Assignment& state);

/// Group of exchangeable pairs of each row, numbered from 0 in order of its first row; −1 where the row's column is
/// the same in every optimal matching. Rows exchange along edges within `tolerance` of tight. O(edges), Tarjan 1972.
std::vector<int32_t> tie_groups(const Graph& graph, const Assignment& optimum, double tolerance);

/// Sorts pairs into compressed sparse rows, columns ascending and without repeats. O(pairs + rows + sorting in rows).
void build_rows(const Pair* pair, int64_t pairs, int64_t rows, std::vector<int64_t>& start,
                std::vector<int32_t>& sorted_col, int threads);

/// The graph's edges by column: start (cols + 1,), rows ascending. O(edges + cols).
void transpose_rows(const Graph& graph, std::vector<int64_t>& start, std::vector<int32_t>& row,
                    std::vector<double>& value);

/// The graph with distinct pairs added, columns ascending; a pair it already has keeps the graph's value.
/// O(edges + pairs · log pairs).
void merge_rows(const Graph& graph, const Pair* pair, const double* value, int64_t pairs, std::vector<int64_t>& start,
                std::vector<int32_t>& col, std::vector<double>& merged);

/// Pairs taken greedily: by falling value, then row, then column, each if both of its sides are free; −1: none. Pairs
/// outside the graph have values of at most row_bound[i] and col_bound[j]: a pair that does not beat both is left
/// undecided, as is whatever depends on it.
std::vector<int32_t> greedy(const Graph& graph, const double* row_bound, const double* col_bound);

}  // namespace e2e
