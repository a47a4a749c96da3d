// Attention and its gradient against the definition in double, at odd shapes, at every SIMD level.
#include "attention.hpp"

#include <cmath>
#include <cstdlib>
#include <memory>

#include "check.hpp"

using namespace e2e;

struct Case {
  int64_t B, H, K, T, D;
  float scale;
  std::vector<float> q, k, v, g;
  int64_t window = 1 << 30;
  float softcap = 0;

  /// out, log₂ Σ e^s, dq, dk, dv. Heads before tokens everywhere.
  std::vector<std::vector<float>> run(int threads) const {
    std::vector<float> out(q.size(), NAN), lse(B * H * T), top(B * H * T, NAN), inverse(B * H * T, NAN),
        dq(q.size(), NAN), dk(k.size(), NAN), dv(k.size(), NAN);
    const auto of_queries = [&](auto& x) { return Heads{x.data(), H * T * D, T * D, D}; };
    const auto of_keys = [&](auto& x) { return Heads{x.data(), K * T * D, T * D, D}; };
    const Attention job{of_queries(q),   of_keys(k), of_keys(v),    B, H, K, T, D, scale, window, softcap,
                        of_queries(out), top.data(), inverse.data()};
    const auto scratch = [&](bool gradient) {
      const int64_t bytes = (attention_scratch(job, gradient, threads) * 4 + 63) / 64 * 64;
      return std::unique_ptr<void, void (*)(void*)>(std::aligned_alloc(64, bytes), std::free);
    };
    attention(job, static_cast<float*>(scratch(false).get()), threads);
    attention_gradient({job, of_queries(g), of_queries(dq), of_keys(dk), of_keys(dv)},
                       static_cast<float*>(scratch(true).get()), threads);
    for (size_t i = 0; i < lse.size(); ++i) lse[i] = top[i] - std::log2(inverse[i]);
    return {out, lse, dq, dk, dv};
  }

  std::vector<std::vector<double>> definition() const {
    std::vector<double> out(q.size()), lse(B * H * T), dq(q.size()), dk(k.size()), dv(k.size());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < T; ++i) {
          const int64_t row = (b * H + h) * T + i, keys = (b * K + h / (H / K)) * T;
          const int64_t oldest = std::max<int64_t>(0, i - window + 1);
          std::vector<double> s(i + 1), ds(i + 1);
          double top = -INFINITY, total = 0, mean = 0;
          for (int64_t j = oldest; j <= i; ++j) {
            for (int64_t d = 0; d < D; ++d) s[j] += static_cast<double>(scale) * q[row * D + d] * k[(keys + j) * D + d];
            if (softcap > 0) s[j] = softcap * std::tanh(s[j] / softcap);
            top = std::max(top, s[j]);
          }
          for (int64_t j = oldest; j <= i; ++j) total += std::exp(s[j] - top);
          const double log_total = top + std::log(total);
          lse[row] = log_total / std::log(2);
          for (int64_t j = oldest; j <= i; ++j)
            for (int64_t d = 0; d < D; ++d) {
              out[row * D + d] += std::exp(s[j] - log_total) * v[(keys + j) * D + d];
              ds[j] += static_cast<double>(g[row * D + d]) * v[(keys + j) * D + d];
            }
          for (int64_t d = 0; d < D; ++d) mean += out[row * D + d] * g[row * D + d];
          for (int64_t j = oldest; j <= i; ++j)
            for (int64_t d = 0; d < D; ++d) {
              const double bent = softcap > 0 ? s[j] / softcap : 0;
              const double p = std::exp(s[j] - log_total), slope = scale * p * (ds[j] - mean) * (1 - bent * bent);
              dv[(keys + j) * D + d] += p * g[row * D + d];
              dq[row * D + d] += slope * k[(keys + j) * D + d];
              dk[(keys + j) * D + d] += slope * q[row * D + d];
            }
        }
    return {out, lse, dq, dk, dv};
  }
};

static Case random_case(int64_t B, int64_t H, int64_t K, int64_t T, int64_t D, float size = 1.7f) {
  Random random;
  return {B,
          H,
          K,
          T,
          D,
          1 / std::sqrt(static_cast<float>(D)),
          random.vector(B * H * T * D, size),
          random.vector(B * K * T * D, size),
          random.vector(B * K * T * D),
          random.vector(B * H * T * D)};
}

static void compare(const Case& c, int threads, double tolerance) {
  const auto got = c.run(threads);
  const auto want = c.definition();
  for (size_t i = 0; i < want.size(); ++i)
    for (size_t j = 0; j < want[i].size(); ++j)
      CHECK(std::abs(got[i][j] - want[i][j]) < tolerance * (1 + std::abs(want[i][j])));
}

static void matches_the_definition() {
  for (int64_t T : {1, 2, 11, 12, 13, 24, 25, 47, 48, 49, 64, 65, 111})
    for (int64_t D : {1, 4, 5, 16, 19}) compare(random_case(1, 2, 1, T, D), 2, 4e-6);
  compare(random_case(2, 6, 3, 70, 33), 2, 4e-6);
  compare(random_case(3, 1, 1, 30, 80), 7, 4e-6);
}

static void scores_may_be_far_apart() { compare(random_case(1, 1, 1, 150, 16, 20), 1, 2e-4); }

static void windows_and_soft_caps_hold() {
  for (int64_t window : {1, 2, 7, 16, 48, 63, 100})
    for (int64_t T : {1, 30, 49, 130}) {
      Case c = random_case(1, 2, 1, T, 5);
      c.window = window;
      compare(c, 2, 4e-6);
    }
  for (float softcap : {0.5f, 5.f, 50.f}) {
    Case c = random_case(1, 2, 2, 131, 16);
    c.softcap = softcap;
    compare(c, 2, 4e-6);
    c.window = 30, c.scale = 1;
    compare(c, 2, 4e-5);  // larger scores
  }
}

static void is_the_same_for_any_number_of_threads() {
  const Case c = random_case(1, 4, 2, 201, 12);
  const auto one = c.run(1);
  CHECK(c.run(2) == one);
  CHECK(c.run(7) == one);
}

static void no_tokens_are_no_work() {
  CHECK(random_case(0, 2, 1, 5, 4).run(2)[0].empty());
  CHECK(random_case(2, 2, 1, 0, 4).run(2)[0].empty());
}

int main() {
  at_every_level(matches_the_definition);
  at_every_level(scores_may_be_far_apart);
  at_every_level(windows_and_soft_caps_hold);
  at_every_level(is_the_same_for_any_number_of_threads);
  at_every_level(no_tokens_are_no_work);
  return failures();
}
