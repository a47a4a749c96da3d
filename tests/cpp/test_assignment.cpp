/// The assignment core against brute force over all permutations, its duals, and the sweep against plain loops.
#include "assignment.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <stdexcept>

#include "check.hpp"

using namespace e2e;

struct Owned {
  std::vector<int64_t> start{0};
  std::vector<int32_t> col;
  std::vector<double> value;
  int64_t cols = 0;
  Graph view() const { return {static_cast<int64_t>(start.size()) - 1, cols, start.data(), col.data(), value.data()}; }
};

/// Each pair is an edge with the given probability; few levels of value make ties.
static Owned random_graph(int64_t rows, int64_t cols, double density, int levels, std::mt19937& rng) {
  Owned g;
  g.cols = cols;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j)
      if (std::uniform_real_distribution<>()(rng) < density || i == j) {
        g.col.push_back(static_cast<int32_t>(j));
        g.value.push_back(static_cast<double>(rng() % levels) / levels - 0.5);
      }
    g.start.push_back(static_cast<int64_t>(g.col.size()));
  }
  return g;
}

static double best_by_enumeration(const Owned& g) {
  const int64_t rows = g.view().rows;
  std::vector<std::vector<double>> dense(rows, std::vector<double>(g.cols, -1e9));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t e = g.start[i]; e < g.start[i + 1]; ++e) dense[i][g.col[e]] = g.value[e];
  std::vector<int> order(g.cols);
  std::iota(order.begin(), order.end(), 0);
  double best = -1e18;
  do {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += dense[i][order[i]];
    best = std::max(best, total);
  } while (std::next_permutation(order.begin(), order.end()));
  return best;
}

static void check_optimal(const Owned& g, const Assignment& a, double best) {
  const Graph view = g.view();
  std::vector<int> used(g.cols, 0);
  double total = 0, dual = 0;
  for (int64_t i = 0; i < view.rows; ++i) {
    double u = -1e18, own = NAN;
    for (int64_t e = g.start[i]; e < g.start[i + 1]; ++e) {
      u = std::max(u, g.value[e] - a.price[g.col[e]]);
      if (g.col[e] == a.col_of_row[i]) own = g.value[e];
    }
    CHECK(!std::isnan(own));
    CHECK(++used[a.col_of_row[i]] == 1);
    CHECK(a.row_of_col[a.col_of_row[i]] == i);
    total += own;
    dual += u;
  }
  for (int64_t j = 0; j < g.cols; ++j) {
    dual += a.price[j];
    if (view.rows < g.cols) CHECK(a.price[j] >= 0);
    if (a.row_of_col[j] < 0) CHECK(a.price[j] == 0);
  }
  CHECK(std::fabs(total - best) < 1e-12);
  CHECK(std::fabs(dual - best) < 1e-12);
}

static void test_assign_equals_enumeration() {
  std::mt19937 rng(0);
  for (int round = 0; round < 400; ++round) {
    const int64_t cols = 1 + rng() % 7, rows = 1 + rng() % cols;
    const Owned g = random_graph(rows, cols, 0.5, round % 2 ? 3 : 1 << 20, rng);
    check_optimal(g, assign(g.view(), round % 3 ? 300 : 0), best_by_enumeration(g));
  }
}

static void test_reassign_takes_up_new_edges() {
  std::mt19937 rng(1);
  for (int round = 0; round < 200; ++round) {
    const int64_t cols = 2 + rng() % 6, rows = round % 2 ? cols : 1 + rng() % cols;
    Owned g = random_graph(rows, cols, 0.3, 1 << 20, rng);
    Assignment state = assign(g.view());
    std::vector<Pair> pairs;
    std::vector<double> values;
    for (int32_t i = 0; i < rows; ++i)
      for (int32_t j = 0; j < cols; ++j)
        if (rng() % 2 && !std::count(g.col.begin() + g.start[i], g.col.begin() + g.start[i + 1], j)) {
          pairs.push_back({i, j});
          values.push_back(static_cast<double>(rng() % 1000) / 1000);
        }
    Owned merged;
    merged.cols = cols;
    merge_rows(g.view(), pairs.data(), values.data(), static_cast<int64_t>(pairs.size()), merged.start, merged.col,
               merged.value);
    CHECK(merged.col.size() == g.col.size() + pairs.size());
    reassign(merged.view(), state);
    check_optimal(merged, state, best_by_enumeration(merged));
  }
}

static void test_ties_are_grouped() {
  // Rows 0 and 1 are alike; row 2 has a column of its own.
  Owned g;
  g.cols = 3;
  g.start = {0, 2, 4, 5};
  g.col = {0, 1, 0, 1, 2};
  g.value = {1, 1, 1, 1, 1};
  CHECK((tie_groups(g.view(), assign(g.view()), 1e-12) == std::vector<int32_t>{0, 0, -1}));
  g.value[0] = 1.5;
  CHECK((tie_groups(g.view(), assign(g.view()), 1e-12) == std::vector<int32_t>{-1, -1, -1}));
}

static void test_infeasible_and_malformed_graphs_throw() {
  Owned g;
  g.cols = 2;
  g.start = {0, 1, 2};
  g.col = {0, 0};
  g.value = {1, 1};
  bool thrown = false;
  try {
    assign(g.view());
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown);
  g.col[1] = 2;
  thrown = false;
  try {
    check_graph(g.view());
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown);
}

static void test_sweep_lists_what_plain_loops_list() {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal;
  const int64_t n = 29, m = 101, d = 37, depth = 40;
  std::vector<float> a(n * d), b(m * d);
  for (float& x : a) x = normal(rng);
  for (float& x : b) x = normal(rng);
  std::vector<double> a_norm(n), b_norm(m), a_error(n), b_error(m);
  row_norms(a.data(), n, d, a_norm.data(), 1);
  row_norms(b.data(), m, d, b_norm.data(), 2);
  std::vector<float> a_scale(n), b_scale(m);
  std::vector<int32_t> a_index(n), b_index(m);
  std::iota(a_index.begin(), a_index.end(), 0);
  std::iota(b_index.begin(), b_index.end(), 0);
  const Rows<float> exact{a.data(), b.data(), a_norm.data(), b_norm.data(), d, false};
  for (const Precision p : {Precision::float32, Precision::bfloat16, Precision::int8}) {
    std::vector<char> a_data(n * depth * 4), b_data(m * depth * 4);
    quantize(a.data(), a_norm.data(), n, d, p, depth, a_data.data(), a_scale.data(), a_error.data(), 1);
    quantize(b.data(), b_norm.data(), m, d, p, depth, b_data.data(), b_scale.data(), b_error.data(), 2);
    const std::vector<float> level(n, 0.2f);
    const Sweep job{.a = {p, n, depth, a_data.data(), a_scale.data()},
                    .b = {p, m, depth, b_data.data(), b_scale.data()},
                    .a_index = a_index.data(),
                    .a_count = n,
                    .b_index = b_index.data(),
                    .b_count = m,
                    .row_level = level.data(),
                    .col_level = nullptr,
                    .price = nullptr,
                    .limit = nullptr,
                    .absolute = false,
                    .block_rows = 0};
    std::vector<uint8_t> capped(n);
    std::vector<uint8_t> listed(n * m, 0);
    for (const Pair& pair : sweep(job, m, capped.data(), 2)) listed[pair.row * m + pair.col] = 1;
    CHECK(std::count(listed.begin(), listed.end(), 1) > 50);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const double bound = a_error[i] * (1 + b_error[j]) + b_error[j] + 1e-5, value = exact.cosine(i, j);
        CHECK(listed[i * m + j] ? value > 0.2 - bound : value <= 0.2 + bound);
      }
  }
}

int main() {
  test_assign_equals_enumeration();
  test_reassign_takes_up_new_edges();
  test_ties_are_grouped();
  test_infeasible_and_malformed_graphs_throw();
  test_sweep_lists_what_plain_loops_list();
  return failures();
}
