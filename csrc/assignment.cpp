#include "assignment.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace e2e {

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kWarmEps = 1e-3;  // first ε of a warm auction, in units of the range of the values
constexpr double kFreed = 0.05;    // share of freed rows above which an auction beats shortest paths alone

/// A row's two best offers: value − price and the columns; second is −∞ for a single edge.
struct Offers {
  double best = -kInf, second = -kInf;
  int32_t col = -1, second_col = -1;
  double value = 0.0;
};

Offers offers(const Graph& g, const std::vector<double>& price, int64_t row) {
  Offers o;
  for (int64_t e = g.start[row]; e < g.start[row + 1]; ++e) {
    const double net = g.value[e] - price[g.col[e]];
    if (net > o.best) {
      o.second = o.best, o.second_col = o.col;
      o.best = net, o.col = g.col[e], o.value = g.value[e];
    } else if (net > o.second) {
      o.second = net, o.second_col = g.col[e];
    }
  }
  return o;
}

/// value − price of a row's own column, −∞ when it has none.
double own_offer(const Graph& g, const Assignment& a, int64_t row) {
  const int32_t own = a.col_of_row[row];
  if (own >= 0)
    for (int64_t e = g.start[row]; e < g.start[row + 1]; ++e)
      if (g.col[e] == own) return g.value[e] - a.price[own];
  return -kInf;
}

/// Spread of the values: the unit in which ε and rounding are measured.
double value_range(const Graph& g) {
  const int64_t edges = g.start[g.rows];
  if (edges == 0) return 1.0;
  const auto [low, high] = std::minmax_element(g.value, g.value + edges);
  return std::max(*high - *low, 1e-300);
}

double value_size(const Graph& g) {
  double size = 0.0;
  for (int64_t e = 0; e < g.start[g.rows]; ++e) size = std::max(size, std::fabs(g.value[e]));
  return size;
}

void give(Assignment& a, int64_t row, int32_t col) {
  a.col_of_row[row] = col;
  a.row_of_col[col] = static_cast<int32_t>(row);
}

/// Frees the rows whose column is not their best, up to rounding.
void keep_tight(const Graph& g, Assignment& a, double slack) {
  for (int64_t i = 0; i < g.rows; ++i) {
    const int32_t own = a.col_of_row[i];
    if (own < 0) continue;
    if (own_offer(g, a, i) < offers(g, a.price, i).best - slack) {
      a.col_of_row[i] = -1;
      a.row_of_col[own] = -1;
    }
  }
}

/// ε-scaling auction for rows == cols, from `first_eps` (in units of the values' range) and the prices in `a`, which
/// only rise: first in, first out; ends each phase with every row within ε of its best.
void auction(const Graph& g, Assignment& a, double first_eps, int64_t budget) {
  const double range = value_range(g);
  std::vector<int32_t> queue;
  for (double eps = range * first_eps; a.bids < budget; eps = std::max(eps / 8, range * 1e-6)) {
    keep_tight(g, a, eps);
    queue.clear();
    for (int64_t i = 0; i < g.rows; ++i)
      if (a.col_of_row[i] < 0 && g.start[i] < g.start[i + 1]) queue.push_back(static_cast<int32_t>(i));
    for (size_t head = 0; head < queue.size() && a.bids < budget; ++head) {
      if (head > 65536 && head * 2 > queue.size()) {
        queue.erase(queue.begin(), queue.begin() + head);
        head = 0;
      }
      const int32_t i = queue[head];
      const Offers o = offers(g, a.price, i);
      // A single edge bids as if the next best were a range away.
      a.price[o.col] += (o.second == -kInf ? range : o.best - o.second) + eps;
      const int32_t loser = a.row_of_col[o.col];
      if (loser >= 0) {
        a.col_of_row[loser] = -1;
        queue.push_back(loser);
      }
      give(a, i, o.col);
      ++a.bids;
    }
    if (eps <= range * 1e-6) break;
  }
}

/// Augmenting row reduction: bids with ε = 0. Prices of unmatched columns stay 0 and every kept pair stays tight.
void reduce_rows(const Graph& g, Assignment& a, int64_t budget) {
  std::vector<int32_t> queue(g.rows);
  std::iota(queue.begin(), queue.end(), 0);
  for (size_t head = 0; head < queue.size() && a.bids < budget; ++head, ++a.bids) {
    const int32_t i = queue[head];
    const Offers o = offers(g, a.price, i);
    if (o.col < 0) continue;
    const double rise = o.second == -kInf ? 0.0 : o.best - o.second;
    int32_t col = o.col;
    if (rise <= 0.0 && a.row_of_col[col] >= 0) {
      // Nothing to bid with: take the equal second column if it is free, else leave the row to the shortest paths.
      if (o.second_col < 0 || a.row_of_col[o.second_col] >= 0 || o.second < o.best) continue;
      col = o.second_col;
    }
    const int32_t loser = a.row_of_col[col];
    if (loser >= 0) {
      a.col_of_row[loser] = -1;
      queue.push_back(loser);
    }
    if (col == o.col) a.price[col] += rise;
    give(a, i, col);
  }
}

/// Matches every free row along a shortest path of reduced costs u_i − (s_ij − p_j) ≥ 0.
class ShortestPaths {
 public:
  ShortestPaths(const Graph& g, Assignment& a)
      : g_(g), a_(a), distance_(g.cols, kInf), parent_(g.cols, -1), settled_(g.cols, 0) {}

  void run() {
    for (int64_t i = 0; i < g_.rows; ++i)
      if (a_.col_of_row[i] < 0) augment(static_cast<int32_t>(i));
  }

 private:
  void relax(int32_t row, double base, double best) {
    for (int64_t e = g_.start[row]; e < g_.start[row + 1]; ++e) {
      const int32_t col = g_.col[e];
      if (settled_[col]) continue;
      // Rounding may leave a matched pair a hair below its row's best; a step is never negative.
      const double step = std::max(best - (g_.value[e] - a_.price[col]), 0.0);
      const double reach = base + step;
      if (reach < distance_[col] && reach < limit_) {
        if (distance_[col] == kInf) touched_.push_back(col);
        distance_[col] = reach;
        parent_[col] = row;
        if (a_.row_of_col[col] < 0) {
          limit_ = reach;  // nothing farther than a free column can end the path
          target_ = col;
        } else {
          heap_.push_back({reach, col});
          std::push_heap(heap_.begin(), heap_.end());
        }
      }
    }
  }

  void augment(int32_t root) {
    limit_ = kInf;
    target_ = -1;
    touched_.clear();
    scanned_.clear();
    heap_.clear();
    relax(root, 0.0, offers(g_, a_.price, root).best);
    while (!heap_.empty()) {
      const auto [reach, col] = heap_.front();
      if (reach >= limit_) break;
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
      if (settled_[col]) continue;
      settled_[col] = 1;
      scanned_.push_back(col);
      ++a_.pops;
      const int32_t row = a_.row_of_col[col];
      relax(row, reach, own_offer(g_, a_, row));
    }
    if (target_ < 0)
      throw std::invalid_argument("no matching covers all rows: row " + std::to_string(root) +
                                  " and the rows it competes with have too few columns between them");
    for (const int32_t col : scanned_) {
      a_.price[col] += limit_ - distance_[col];
      settled_[col] = 0;
    }
    for (int32_t col = target_;;) {
      const int32_t row = parent_[col], next = a_.col_of_row[row];
      give(a_, row, col);
      if (row == root) break;
      col = next;
    }
    for (const int32_t col : touched_) distance_[col] = kInf;
  }

  struct Entry {
    double reach;
    int32_t col;
    bool operator<(const Entry& other) const {
      return reach > other.reach || (reach == other.reach && col > other.col);
    }
  };

  const Graph& g_;
  Assignment& a_;
  std::vector<double> distance_;
  std::vector<int32_t> parent_;
  std::vector<uint8_t> settled_;
  std::vector<int32_t> touched_, scanned_;
  std::vector<Entry> heap_;
  double limit_ = kInf;
  int32_t target_ = -1;
};

}  // namespace

void check_graph(const Graph& g) {
  if (g.rows > g.cols)
    throw std::invalid_argument("rows must not outnumber cols, got " + std::to_string(g.rows) + " rows and " +
                                std::to_string(g.cols) + " cols; transpose the graph");
  if (g.start[0] != 0) throw std::invalid_argument("start must begin with 0, got " + std::to_string(g.start[0]));
  for (int64_t i = 0; i < g.rows; ++i)
    if (g.start[i + 1] < g.start[i])
      throw std::invalid_argument("start must ascend, it falls after row " + std::to_string(i));
  for (int64_t e = 0; e < g.start[g.rows]; ++e) {
    if (g.col[e] < 0 || g.col[e] >= g.cols)
      throw std::invalid_argument("col must lie in [0, " + std::to_string(g.cols) + "), got " +
                                  std::to_string(g.col[e]) + " at edge " + std::to_string(e));
    if (!std::isfinite(g.value[e]))
      throw std::invalid_argument("value must be finite, got " + std::to_string(g.value[e]) + " at edge " +
                                  std::to_string(e));
  }
}

Assignment assign(const Graph& g, int64_t bids_per_row) {
  Assignment a;
  a.col_of_row.assign(g.rows, -1);
  a.row_of_col.assign(g.cols, -1);
  a.price.assign(g.cols, 0.0);
  if (g.rows == g.cols) {
    auction(g, a, 0.05, bids_per_row * g.rows);
    keep_tight(g, a, 8 * std::numeric_limits<double>::epsilon() * value_size(g));
  } else {
    reduce_rows(g, a, std::min<int64_t>(bids_per_row, 20) * g.rows);
  }
  ShortestPaths(g, a).run();
  return a;
}

void reassign(const Graph& g, Assignment& a) {
  if (g.rows == g.cols) {
    const double rounding = 8 * std::numeric_limits<double>::epsilon() * value_size(g);
    keep_tight(g, a, rounding);
    const auto freed = std::count(a.col_of_row.begin(), a.col_of_row.end(), -1);
    if (freed > g.rows * kFreed) {
      auction(g, a, kWarmEps, a.bids + 300 * g.rows);
      keep_tight(g, a, rounding);
    }
    ShortestPaths(g, a).run();
  } else {
    const int64_t bids = a.bids, pops = a.pops;
    a = assign(g);
    a.bids += bids, a.pops += pops;
  }
}

std::vector<int32_t> tie_groups(const Graph& g, const Assignment& a, double tolerance) {
  // Row i points to row k when i could take k's column at no loss. One more node stands for "no row": i points to it
  // when a free column is tight for i, it points to k when k's column, of price 0, may stay free.
  const int64_t free_node = g.rows, nodes = g.rows + 1;
  std::vector<int32_t> to;
  std::vector<int64_t> start(nodes + 1, 0);
  for (int64_t i = 0; i < g.rows; ++i) {
    const double best = own_offer(g, a, i);
    bool to_free = false;
    for (int64_t e = g.start[i]; e < g.start[i + 1]; ++e) {
      if (g.col[e] == a.col_of_row[i] || g.value[e] - a.price[g.col[e]] < best - tolerance) continue;
      const int32_t owner = a.row_of_col[g.col[e]];
      if (owner >= 0) to.push_back(owner);
      else to_free = true;
    }
    if (to_free) to.push_back(static_cast<int32_t>(free_node));
    start[i + 1] = static_cast<int64_t>(to.size());
  }
  if (g.rows < g.cols)
    for (int64_t j = 0; j < g.cols; ++j)
      if (a.row_of_col[j] >= 0 && a.price[j] <= tolerance) to.push_back(a.row_of_col[j]);
  start[nodes] = static_cast<int64_t>(to.size());

  // Strongly connected components by Tarjan's algorithm with an explicit stack.
  std::vector<int32_t> order(nodes, -1), low(nodes, 0), group(nodes, -1), stack, path;
  std::vector<int64_t> edge(start.begin(), start.end() - 1);
  std::vector<uint8_t> on_stack(nodes, 0);
  int32_t clock = 0, groups = 0;
  for (int32_t root = 0; root < nodes; ++root) {
    if (order[root] >= 0) continue;
    path.push_back(root);
    while (!path.empty()) {
      const int32_t node = path.back();
      if (order[node] < 0) {
        order[node] = low[node] = clock++;
        stack.push_back(node);
        on_stack[node] = 1;
      }
      bool descended = false;
      while (edge[node] < start[node + 1]) {
        const int32_t next = to[edge[node]];
        if (order[next] < 0) {
          path.push_back(next);
          descended = true;
          break;
        }
        if (on_stack[next]) low[node] = std::min(low[node], low[next]);
        ++edge[node];
      }
      if (descended) continue;
      path.pop_back();
      if (low[node] != order[node]) continue;
      const bool alone = stack.back() == node;
      for (int32_t member = -1; member != node;) {
        member = stack.back();
        stack.pop_back();
        on_stack[member] = 0;
        group[member] = alone ? -1 : groups;
      }
      if (!alone) ++groups;
    }
  }
  std::vector<int32_t> renumber(groups, -1), result(g.rows);
  int32_t next = 0;
  for (int64_t i = 0; i < g.rows; ++i) {
    if (group[i] >= 0 && renumber[group[i]] < 0) renumber[group[i]] = next++;
    result[i] = group[i] < 0 ? -1 : renumber[group[i]];
  }
  return result;
}

void build_rows(const Pair* pair, int64_t pairs, int64_t rows, std::vector<int64_t>& start,
                std::vector<int32_t>& sorted_col, int threads) {
  std::vector<int64_t> begin(rows + 1, 0);
  for (int64_t e = 0; e < pairs; ++e) ++begin[pair[e].row + 1];
  for (int64_t i = 0; i < rows; ++i) begin[i + 1] += begin[i];
  std::vector<int32_t> placed(pairs);
  std::vector<int64_t> at(begin.begin(), begin.end() - 1), kept(rows, 0);
  for (int64_t e = 0; e < pairs; ++e) placed[at[pair[e].row]++] = pair[e].col;
  constexpr int64_t block = 1024;
  parallel_jobs((rows + block - 1) / block, threads, [&](int64_t job, int) {
    for (int64_t i = job * block; i < std::min(rows, (job + 1) * block); ++i) {
      const auto first = placed.begin() + begin[i], last = placed.begin() + begin[i + 1];
      std::sort(first, last);
      kept[i] = std::unique(first, last) - first;
    }
  });
  start.assign(rows + 1, 0);
  for (int64_t i = 0; i < rows; ++i) start[i + 1] = start[i] + kept[i];
  sorted_col.resize(start[rows]);
  for (int64_t i = 0; i < rows; ++i)
    std::copy(placed.begin() + begin[i], placed.begin() + begin[i] + kept[i], sorted_col.begin() + start[i]);
}

void transpose_rows(const Graph& g, std::vector<int64_t>& start, std::vector<int32_t>& row,
                    std::vector<double>& value) {
  const int64_t edges = g.start[g.rows];
  start.assign(g.cols + 1, 0);
  row.resize(edges);
  value.resize(edges);
  for (int64_t e = 0; e < edges; ++e) ++start[g.col[e] + 1];
  for (int64_t j = 0; j < g.cols; ++j) start[j + 1] += start[j];
  std::vector<int64_t> at(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t e = g.start[i]; e < g.start[i + 1]; ++e) {
      const int64_t to = at[g.col[e]]++;
      row[to] = static_cast<int32_t>(i);
      value[to] = g.value[e];
    }
}

void merge_rows(const Graph& g, const Pair* pair, const double* value, int64_t pairs, std::vector<int64_t>& start,
                std::vector<int32_t>& col, std::vector<double>& merged) {
  std::vector<int64_t> order(pairs), fresh(g.rows + 1, 0);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    return pair[x].row != pair[y].row ? pair[x].row < pair[y].row : pair[x].col < pair[y].col;
  });
  std::vector<int64_t> added;
  for (const int64_t e : order) {
    const auto* first = g.col + g.start[pair[e].row];
    const auto* last = g.col + g.start[pair[e].row + 1];
    if (std::binary_search(first, last, pair[e].col)) continue;
    added.push_back(e);
    ++fresh[pair[e].row + 1];
  }
  start.assign(g.rows + 1, 0);
  for (int64_t i = 0; i < g.rows; ++i) start[i + 1] = start[i] + (g.start[i + 1] - g.start[i]) + fresh[i + 1];
  col.resize(start[g.rows]);
  merged.resize(start[g.rows]);
  size_t next = 0;
  for (int64_t i = 0; i < g.rows; ++i) {
    int64_t out = start[i];
    for (int64_t e = g.start[i]; e < g.start[i + 1]; ++e) {
      for (; next < added.size() && pair[added[next]].row == i && pair[added[next]].col < g.col[e]; ++next, ++out)
        col[out] = pair[added[next]].col, merged[out] = value[added[next]];
      col[out] = g.col[e], merged[out++] = g.value[e];
    }
    for (; next < added.size() && pair[added[next]].row == i; ++next, ++out)
      col[out] = pair[added[next]].col, merged[out] = value[added[next]];
  }
}

std::vector<int32_t> greedy(const Graph& g, const double* row_bound, const double* col_bound) {
  struct Edge {
    double value;
    int32_t row, col;
  };
  std::vector<Edge> edges;
  edges.reserve(g.start[g.rows]);
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t e = g.start[i]; e < g.start[i + 1]; ++e)
      edges.push_back({g.value[e], static_cast<int32_t>(i), g.col[e]});
  std::sort(edges.begin(), edges.end(), [](const Edge& x, const Edge& y) {
    if (x.value != y.value) return x.value > y.value;
    return x.row != y.row ? x.row < y.row : x.col < y.col;
  });
  std::vector<int32_t> match(g.rows, -1);
  enum : uint8_t { open, taken, undecided };
  std::vector<uint8_t> row_state(g.rows, open), col_state(g.cols, open);
  for (const Edge& edge : edges) {
    uint8_t &row = row_state[edge.row], &col = col_state[edge.col];
    if (row == taken || col == taken) continue;
    if (row == open && col == open && edge.value > row_bound[edge.row] && edge.value > col_bound[edge.col]) {
      match[edge.row] = edge.col;
      row = col = taken;
    } else {
      row = col = undecided;  // this pair may yet be taken, so nothing after it can be
    }
  }
  return match;
}

}  // namespace e2e
