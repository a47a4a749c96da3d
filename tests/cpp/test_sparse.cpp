// Selection, decode and the one-pass backward against loops in double, at every SIMD level.
#include "sparse.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "check.hpp"

using namespace e2e;

static double product(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

struct Code {
  std::vector<float> values;
  std::vector<int32_t> indices, count;
};

template <class Scores>
static Code finish(Scores& selection, int64_t rows, int64_t slots, int threads) {
  Code code{std::vector<float>(rows * slots, NAN), std::vector<int32_t>(rows * slots, -7),
            std::vector<int32_t>(rows, -7)};
  selection.finish(code.values.data(), code.indices.data(), code.count.data(), slots, threads);
  return code;
}

/// Columns of every row in the order in which they must be selected.
static std::vector<int32_t> ranking(const float* scores, int64_t n) {
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  return order;
}

static void selection_finds_the_k_best_across_blocks() {
  Random random;
  for (int64_t columns : {1, 7, 513, 3000})
    for (int64_t k : {1, 5, 40})
      for (int threads : {1, 3}) {
        if (k > columns) continue;
        const int64_t rows = 4;
        std::vector<float> z = random.vector(rows * columns);
        for (int64_t i = 0; i < rows * columns; i += 3) z[i] = 0.75f;  // ties: the lower index must win
        Selection selection(rows, k);
        for (int64_t first = 0; first < columns; first += 700) {
          const int64_t width = std::min<int64_t>(700, columns - first);
          std::vector<float> block(rows * width);
          for (int64_t r = 0; r < rows; ++r) std::copy_n(&z[r * columns + first], width, &block[r * width]);
          selection.add(block.data(), width, first, threads);
        }
        const Code code = finish(selection, rows, k, threads);
        for (int64_t r = 0; r < rows; ++r) {
          const auto order = ranking(&z[r * columns], columns);
          for (int64_t i = 0; i < k; ++i) {
            const float expected = std::max(0.f, z[r * columns + order[i]]);
            CHECK(code.values[r * k + i] == expected);
            CHECK(code.indices[r * k + i] == (expected > 0 ? order[i] : 0));
          }
        }
      }
}

static void positives_are_kept_up_to_the_limit() {
  Random random;
  const int64_t rows = 150, columns = 1001;
  const std::vector<float> z = random.vector(rows * columns);
  for (int64_t limit : {-1, 0, 4, 2000}) {
    Positives selection(rows, limit);
    for (int64_t first = 0; first < columns; first += 600) {
      const int64_t width = std::min<int64_t>(600, columns - first);
      std::vector<float> block(rows * width);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(&z[r * columns + first], width, &block[r * width]);
      selection.add(block.data(), width, first, 2);
    }
    const int64_t slots = limit < 0 ? selection.fullest() : limit;
    const Code code = finish(selection, rows, slots, 2);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t slot = 0, active = 0;
      for (int64_t j = 0; j < columns; ++j) {
        if (z[r * columns + j] <= 0) continue;
        ++active;
        if (slot >= slots) continue;
        CHECK(code.values[r * slots + slot] == z[r * columns + j]);
        CHECK(code.indices[r * slots + slot] == j);
        ++slot;
      }
      CHECK(code.count[r] == active);
      for (; slot < slots; ++slot) CHECK(code.values[r * slots + slot] == 0 && code.indices[r * slots + slot] == 0);
    }
  }
}

static void nan_scores_are_the_greatest() {
  std::vector<float> z(600, 1.f);
  z[599] = NAN, z[300] = -NAN, z[4] = INFINITY;
  Selection selection(1, 3);
  selection.add(z.data(), 600, 0, 1);
  const Code code = finish(selection, 1, 3, 1);
  CHECK((code.indices == std::vector<int32_t>{300, 599, 4}));
  CHECK(std::isnan(code.values[0]) && std::isnan(code.values[1]));
  std::fill(z.begin(), z.end(), -1.f);
  z[599] = NAN, z[300] = -NAN, z[4] = INFINITY;
  Positives positives(1, -1);
  positives.add(z.data(), 600, 0, 1);
  const Code active = finish(positives, 1, 3, 1);
  CHECK((active.indices == std::vector<int32_t>{4, 300, 599}));
  CHECK(active.values[0] == INFINITY && std::isnan(active.values[1]) && std::isnan(active.values[2]));
}

static void screening_selects_what_exact_scores_select() {
  Random random;
  for (int64_t depth : {1, 37, 200})
    for (int64_t rows : {1, 6, 45}) {
      const int64_t columns = 900;
      std::vector<float> x = random.vector(rows * depth, 3), w = random.vector(columns * depth, 2);
      const std::vector<float> bias = random.vector(columns);
      std::fill_n(&w[5 * depth], depth, 0.f);
      for (int64_t i = 0; i < depth; ++i) w[6 * depth + i] = w[7 * depth + i] = 1e-39f;  // subnormal
      std::copy_n(&w[10 * depth], depth, &w[11 * depth]);                                // a tie
      for (int64_t r = 0; r < rows; ++r)  // tiles of rows of very different norms, zeros among them
        for (int64_t i = 0; i < depth; ++i)
          x[r * depth + i] *= r % 5 == 3 ? 0.f : std::ldexp(1.f, static_cast<int>(r * 7 % 23) - 20);
      std::vector<float> exact(rows * columns), floor = random.vector(columns, 4);
      for (float& f : floor) f = std::max(f, 0.f);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < columns; ++j)
          exact[r * columns + j] =
              static_cast<float>(product(&x[r * depth], &w[j * depth], depth) + static_cast<double>(bias[j]));
      const Scoring job{x.data(), w.data(), bias.data(), columns, depth};
      const auto same = [&](auto& screened, auto& plain, int64_t slots) {
        const Code a = finish(screened, rows, slots, 1), b = finish(plain, rows, slots, 1);
        CHECK(a.indices == b.indices);
        CHECK(a.count == b.count);
        for (size_t i = 0; i < a.values.size(); ++i) CHECK(std::abs(a.values[i] - b.values[i]) < 1e-3f);
      };
      for (Precision precision : {Precision::int8, Precision::bfloat16})
        for (int threads : {1, 3}) {
          Selection screened(rows, 9), plain(rows, 9);
          CHECK(screened.screen(job, precision, 1, threads));
          plain.add(exact.data(), columns, 0, 2);
          same(screened, plain, 9);
          for (int64_t limit : {-1, 40})
            for (bool with_floor : {false, true}) {
              Scoring given = job;
              std::vector<float> above = exact;
              if (with_floor) {
                given.floor = floor.data();
                for (int64_t e = 0; e < rows * columns; ++e)
                  if (above[e] <= floor[e % columns]) above[e] = 0;
              }
              Positives some(rows, limit), all(rows, limit);
              CHECK(some.screen(given, precision, 1, threads));
              all.add(above.data(), columns, 0, 2);
              CHECK(some.fullest() == all.fullest());
              same(some, all, limit < 0 ? all.fullest() : limit);
            }
        }
    }
}

static void screening_gives_up_on_too_many_candidates_and_on_what_is_not_finite() {
  Random random;
  const int64_t rows = 40, depth = 12, columns = 500;
  std::vector<float> x = random.vector(rows * depth), w = random.vector(columns * depth);
  const Scoring job{x.data(), w.data(), nullptr, columns, depth};
  Positives selection(rows, -1);
  CHECK(!selection.screen(job, Precision::int8, 3, 2));  // half of all features are positive
  CHECK(selection.fullest() == 0);
  CHECK(selection.screen(job, Precision::int8, 1, 2));
  for (float bad : {NAN, INFINITY, 1e38f}) {  // 1e38: its square is infinite
    x[rows * depth - 1] = bad;
    CHECK(!Selection(rows, 3).screen(job, Precision::bfloat16, 1, 2));
    CHECK(!Positives(rows, -1).screen(job, Precision::bfloat16, 1, 2));
  }
}

static void decode_and_backward_match_loops() {
  Random random;
  for (int64_t D : {1, 4, 5, 8, 16, 32, 33, 64, 70, 128})
    for (bool normalize : {true, false})
      for (int threads : {1, 3}) {
        const int64_t N = 9, K = 4, F = 11;
        std::vector<float> values = random.vector(N * K), W = random.vector(F * D), x = random.vector(N * D),
                           g = random.vector(N * D), bias = random.vector(D), dv_in = random.vector(N * K);
        std::vector<int32_t> indices(N * K);
        for (int64_t i = 0; i < N * K; ++i) indices[i] = static_cast<int32_t>((i * 5 + i / K) % (F - 2));
        std::vector<double> scale(F, 1);
        if (normalize)
          for (int64_t j = 0; j < F; ++j) scale[j] = 1 / std::sqrt(product(&W[j * D], &W[j * D], D));

        std::vector<float> y(N * D, NAN);
        decode(values.data(), indices.data(), N, K, W.data(), F, D, normalize, bias.data(), Slots::positive, y.data(),
               threads);
        std::vector<double> a(F * D), e(F * D), db(F);
        std::vector<float> dv(N * K, NAN), dW_dec(F * D, NAN), dW_enc(F * D, NAN), db_enc(F, NAN);
        code_backward({N, K, F, D, values.data(), indices.data(), dv_in.data(), 1, N, g.data(), W.data(), x.data(),
                       normalize, dW_dec.data(), dW_enc.data(), db_enc.data(), dv.data()},
                      threads);
        for (int64_t n = 0; n < N; ++n) {
          std::vector<double> expected(bias.begin(), bias.end());
          for (int64_t k = 0; k < K; ++k) {
            const int64_t i = n * K + k, j = indices[i];
            if (values[i] <= 0) {
              CHECK(dv[i] == 0);
              continue;
            }
            const double c = scale[j] * product(&g[n * D], &W[j * D], D) + dv_in[n + k * N];  // strided
            CHECK(std::abs(dv[i] - c) < 1e-5);
            db[j] += c;
            for (int64_t d = 0; d < D; ++d) {
              expected[d] += values[i] * scale[j] * W[j * D + d];
              a[j * D + d] += static_cast<double>(values[i]) * g[n * D + d];
              e[j * D + d] += c * x[n * D + d];
            }
          }
          for (int64_t d = 0; d < D; ++d) CHECK(std::abs(y[n * D + d] - expected[d]) < 1e-5);
        }
        for (int64_t j = 0; j < F; ++j) {
          double along = 0;
          for (int64_t d = 0; d < D && normalize; ++d) along += a[j * D + d] * W[j * D + d] * scale[j] * scale[j];
          CHECK(std::abs(db_enc[j] - db[j]) < 1e-5);
          for (int64_t d = 0; d < D; ++d) {
            const double tangent = scale[j] * (a[j * D + d] - along * W[j * D + d]);
            CHECK(std::abs(dW_dec[j * D + d] - tangent) < 1e-4 * std::max(1.0, scale[j]));
            CHECK(std::abs(dW_enc[j * D + d] - e[j * D + d]) < 1e-5);
          }
        }
        for (int64_t d = 0; d < 2 * D; ++d) CHECK(dW_dec[(F - 2) * D + d] == 0 && dW_enc[(F - 2) * D + d] == 0);
      }
}

static void indices_out_of_range_are_refused() {
  const std::vector<float> values{1, 1}, W(6, 1.f);
  std::vector<float> y(2), dv(2);
  for (int32_t bad : {-1, 3, INT32_MAX}) {
    const std::vector<int32_t> indices{0, bad};
    CHECK(throws<std::invalid_argument>([&] {
      decode(values.data(), indices.data(), 1, 2, W.data(), 3, 2, true, nullptr, Slots::positive, y.data(), 1);
    }));
    CHECK(throws<std::invalid_argument>([&] {
      code_backward({1, 2, 3, 2, values.data(), indices.data(), nullptr, 0, 0, nullptr, nullptr, nullptr, true, nullptr,
                     nullptr, nullptr, dv.data()},
                    1);
    }));
  }
}

static void empty_inputs_are_legal() {
  decode(nullptr, nullptr, 0, 3, nullptr, 5, 4, true, nullptr, Slots::positive, nullptr, 2);
  Selection none(0, 3);
  none.finish(nullptr, nullptr, nullptr, 3, 2);
  Positives blank(2, -1);
  CHECK(blank.fullest() == 0);
  const Code nothing = finish(blank, 2, 3, 2);
  CHECK(nothing.values == std::vector<float>(6) && nothing.indices == std::vector<int32_t>(6) &&
        nothing.count == std::vector<int32_t>(2));
  std::vector<float> dW(8, NAN), dv;
  const std::vector<float> W(8, 1.f);
  code_backward({0, 0, 2, 4, nullptr, nullptr, nullptr, 0, 0, W.data(), W.data(), nullptr, true, dW.data(), nullptr,
                 nullptr, nullptr},
                2);
  for (float v : dW) CHECK(v == 0);
}

int main() {
  at_every_level(selection_finds_the_k_best_across_blocks);
  at_every_level(positives_are_kept_up_to_the_limit);
  at_every_level(nan_scores_are_the_greatest);
  at_every_level(screening_selects_what_exact_scores_select);
  at_every_level(screening_gives_up_on_too_many_candidates_and_on_what_is_not_finite);
  at_every_level(decode_and_backward_match_loops);
  at_every_level(indices_out_of_range_are_refused);
  at_every_level(empty_inputs_are_legal);
  std::vector<char> page(3 << 20);
  prefer_huge_pages(page.data(), static_cast<int64_t>(page.size()));
  prefer_huge_pages(nullptr, 0);
  keep_freed_memory(64 << 20);
  return failures();
}
