// The row kernel against the definition in double, at odd widths, at every SIMD level.
#include "softmax_kl.hpp"

#include <cmath>
#include <limits>

#include "check.hpp"

using namespace e2e;

static std::vector<double> softmax(const float* z, int64_t n, double cap) {
  std::vector<double> p(n);
  double top = -INFINITY, total = 0;
  const auto capped = [&](float v) { return cap > 0 ? cap * std::tanh(v / cap) : v; };
  for (int64_t i = 0; i < n; ++i) top = std::max<double>(top, capped(z[i]));
  for (int64_t i = 0; i < n; ++i) total += p[i] = std::exp(capped(z[i]) - top);
  for (double& v : p) v /= total;
  return p;
}

static void matches_the_definition() {
  Random random;
  for (int64_t columns : {1, 2, 15, 16, 17, 100, 2048, 2049, 5003})
    for (float cap : {0.f, 6.f})
      for (int threads : {1, 3}) {
        const int64_t rows = 5;
        const std::vector<float> t0 = random.vector(rows * columns, 8);
        std::vector<float> s0 = t0;
        for (float& v : s0) v += 0.2f * random.next();
        std::vector<float> t = t0, s = s0, loss(rows, NAN);
        softmax_kl_rows(t.data(), s.data(), rows, columns, cap, true, loss.data(), threads);
        for (int64_t r = 0; r < rows; ++r) {
          const auto p = softmax(&t0[r * columns], columns, cap), q = softmax(&s0[r * columns], columns, cap);
          double kl = 0;
          for (int64_t i = 0; i < columns; ++i) {
            if (p[i] > 0) kl += p[i] * (std::log(p[i]) - std::log(q[i]));
            const double y = cap > 0 ? std::tanh(s0[r * columns + i] / cap) : 0;
            CHECK(std::abs(s[r * columns + i] - (q[i] - p[i]) * (1 - y * y)) < 1e-6);
          }
          CHECK(std::abs(loss[r] - kl) < 2e-6);
        }
        t = t0, s = t0;
        softmax_kl_rows(t.data(), s.data(), rows, columns, cap, true, loss.data(), threads);
        for (float v : s) CHECK(v == 0);
        for (float v : loss) CHECK(v == 0);
      }
}

static void treats_infinities_and_nan_as_documented() {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> t{1, -inf, 0, 1, 0, 0}, s{1, -inf, 0.5f, -inf, 0, 0}, loss(2);
  softmax_kl_rows(t.data(), s.data(), 2, 3, 0, true, loss.data(), 1);
  CHECK(std::isfinite(loss[0]) && loss[0] > 0 && s[1] == 0);
  CHECK(loss[1] == inf);
  t = {1, 2, 3}, s = {1, NAN, 3};
  softmax_kl_rows(t.data(), s.data(), 1, 3, 0, true, loss.data(), 1);
  CHECK(std::isnan(loss[0]));
}

static void gradient_can_be_left_out() {
  std::vector<float> t{1, 2, 3}, s{3, 1, 2}, loss(1);
  softmax_kl_rows(t.data(), s.data(), 1, 3, 0, false, loss.data(), 1);
  CHECK((s == std::vector<float>{3, 1, 2}) && loss[0] > 0);
}

int main() {
  at_every_level(matches_the_definition);
  at_every_level(treats_infinities_and_nan_as_documented);
  at_every_level(gradient_can_be_left_out);
  return failures();
}
