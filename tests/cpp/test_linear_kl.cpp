// linear_kl against the definition in double, at odd shapes, at every SIMD level.
#include "linear_kl.hpp"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "check.hpp"

using namespace e2e;

static const float kInf = std::numeric_limits<float>::infinity();

struct Case {
  int64_t S, N, D, V;
  float cap;
  std::vector<float> students, teacher, weight, bias;

  /// Losses (S · N), then, where asked for, the gradient (S · N · D).
  std::vector<float> run(bool gradient, int threads) const {
    std::vector<float> out(S * N * (gradient ? 1 + D : 1), NAN);
    const LinearKl job{students.data(),
                       teacher.data(),
                       weight.data(),
                       bias.empty() ? nullptr : bias.data(),
                       S,
                       N,
                       D,
                       V,
                       cap,
                       out.data(),
                       gradient ? out.data() + S * N : nullptr};
    const int64_t bytes = (linear_kl_scratch(job, threads) * 4 + 63) / 64 * 64;
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, bytes), std::free);
    linear_kl(job, static_cast<float*>(scratch.get()), threads);
    return out;
  }

  std::vector<double> logits(const float* h) const {
    std::vector<double> z(V);
    for (int64_t v = 0; v < V; ++v) {
      z[v] = bias.empty() ? 0 : bias[v];
      for (int64_t d = 0; d < D; ++d) z[v] += static_cast<double>(weight[v * D + d]) * h[d];
      if (cap > 0) z[v] = cap * std::tanh(z[v] / cap);
    }
    return z;
  }
};

static Case random_case(int64_t S, int64_t N, int64_t D, int64_t V, float cap, bool bias) {
  Random random;
  Case c{S, N, D, V, cap, {}, random.vector(N * D), random.vector(V * D, 4 / std::sqrt(static_cast<float>(D))), {}};
  for (int64_t s = 0; s < S; ++s)
    for (float h : c.teacher) c.students.push_back(h + 0.2f * random.next());
  if (bias) c.bias = random.vector(V, 2);
  return c;
}

static std::vector<double> log_softmax(std::vector<double> z) {
  double top = -INFINITY, total = 0;
  for (double v : z) top = std::max(top, v);
  for (double v : z) total += std::exp(v - top);
  for (double& v : z) v -= top + std::log(total);
  return z;
}

static void compare(const Case& c, int threads) {
  const std::vector<float> got = c.run(true, threads);
  double tolerance = 4e-6;  // and two roundings of the greatest logit
  for (float b : c.bias) tolerance = std::max(tolerance, 2.4e-7 * std::abs(b));
  for (int64_t s = 0; s < c.S; ++s)
    for (int64_t n = 0; n < c.N; ++n) {
      const std::vector<double> z_s = c.logits(&c.students[(s * c.N + n) * c.D]);
      const auto p = log_softmax(c.logits(&c.teacher[n * c.D])), q = log_softmax(z_s);
      double kl = 0;
      std::vector<double> gradient(c.D);
      for (int64_t v = 0; v < c.V; ++v) {
        if (std::exp(p[v]) > 0) kl += std::exp(p[v]) * (p[v] - q[v]);
        const double slope = c.cap > 0 ? 1 - std::pow(z_s[v] / c.cap, 2) : 1;
        for (int64_t d = 0; d < c.D; ++d)
          gradient[d] += (std::exp(q[v]) - std::exp(p[v])) * slope * c.weight[v * c.D + d];
      }
      CHECK(std::abs(got[s * c.N + n] - kl) < tolerance * (1 + kl));
      for (int64_t d = 0; d < c.D; ++d)
        CHECK(std::abs(got[c.S * c.N + (s * c.N + n) * c.D + d] - gradient[d]) < tolerance);
    }
}

static void matches_the_definition() {
  for (int64_t V : {1, 2, 7, 127, 128, 129, 517})
    for (int64_t D : {1, 5, 16, 33})
      for (float cap : {0.f, 3.f}) compare(random_case(2, 5, D, V, cap, V % 2), 2);
  for (int64_t N : {1, 16, 17, 47, 48, 49, 100}) compare(random_case(1, N, 8, 150, 0, true), 1);
}

static void is_the_same_for_any_number_of_threads() {
  const Case c = random_case(2, 101, 24, 300, 0, true);
  const std::vector<float> one = c.run(true, 1);
  CHECK(c.run(true, 2) == one);
  CHECK(c.run(true, 7) == one);
}

static void equal_states_give_exactly_zero() {
  for (float cap : {0.f, 3.f}) {
    Case c = random_case(1, 50, 24, 900, cap, true);
    for (int64_t v = 0; v < c.V; ++v) c.bias[v] += static_cast<float>(v) / 9;  // the maximum rises from chunk to chunk
    c.students = c.teacher;
    for (float v : c.run(true, 1)) CHECK(v == 0);
  }
}

static void maxima_may_come_late_and_differ_between_the_two() {
  for (float step : {3.f, 200.f, 5000.f}) {  // per chunk of rows: beyond 87 the old sums vanish
    Case c = random_case(1, 20, 3, 700, 0, true);
    for (int64_t v = 0; v < c.V; ++v) c.bias[v] += step * static_cast<float>(v / 128);
    compare(c, 1);
    for (int64_t v = 0; v < c.V; ++v) c.bias[v] -= 2 * step * static_cast<float>(v / 128);
    compare(c, 1);
  }
}

static void leading_rows_may_have_no_probability() {
  Case c = random_case(1, 20, 3, 400, 0, true), rest = c;
  for (int64_t v = 0; v < 300; ++v) c.bias[v] = -kInf;
  rest.V = 100;
  rest.weight.erase(rest.weight.begin(), rest.weight.begin() + 300 * 3);
  rest.bias.erase(rest.bias.begin(), rest.bias.begin() + 300);
  const std::vector<float> got = c.run(true, 1), want = rest.run(true, 1);
  for (size_t i = 0; i < got.size(); ++i) CHECK(std::abs(got[i] - want[i]) < 1e-6);
}

static void treats_infinities_and_nan_as_documented() {
  // One dimension, so that logits are the weights times h.
  Case c{1, 2, 1, 2, 0, {1e30f, 0}, {0, 1}, {-1e10f, 0}, {}};  // token 0: student (-inf, 0), teacher (0, 0)
  std::vector<float> got = c.run(true, 1);
  CHECK(got[0] == kInf);
  CHECK(std::isfinite(got[1]));
  std::swap(c.students, c.teacher);
  got = c.run(true, 1);
  CHECK(std::isfinite(got[0]) && got[0] > 0);
  c.students[1] = NAN;
  got = c.run(true, 1);
  CHECK(std::isfinite(got[0]) && std::isfinite(got[2]) && std::isnan(got[1]) && std::isnan(got[3]));
}

static void gradient_can_be_left_out() {
  const Case c = random_case(2, 30, 7, 300, 0, false);
  std::vector<float> both = c.run(true, 1);
  both.resize(c.S * c.N);
  CHECK(c.run(false, 1) == both);
}

static void no_tokens_are_no_work() { CHECK(random_case(1, 0, 4, 9, 0, true).run(true, 2).empty()); }

int main() {
  at_every_level(matches_the_definition);
  at_every_level(is_the_same_for_any_number_of_threads);
  at_every_level(equal_states_give_exactly_zero);
  at_every_level(maxima_may_come_late_and_differ_between_the_two);
  at_every_level(leading_rows_may_have_no_probability);
  at_every_level(treats_infinities_and_nan_as_documented);
  at_every_level(gradient_can_be_left_out);
  at_every_level(no_tokens_are_no_work);
  return failures();
}
