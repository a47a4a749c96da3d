// Both GELUs against the definition in double, at every SIMD level.
#include "gelu.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.hpp"

using namespace e2e;

static double share(double x, Gelu kind) {
  if (kind == Gelu::erf) return 0.5 * std::erfc(-x / std::sqrt(2.0));
  return 1 / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double slope(double x, Gelu kind) {
  if (kind == Gelu::erf) return std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
  const double s = share(x, kind), u = 2 * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
  return s * share(-x, kind) * u;
}

static void is_as_exact_as_documented() {
  std::vector<float> x;
  for (float v = -30; v < 30; v += 0.000731f) x.push_back(v);
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<float> y(n), dx(n), ones(n, 1);
  for (Gelu kind : {Gelu::erf, Gelu::tanh}) {
    gelu(x.data(), n, kind, y.data(), 2);
    gelu_gradient(x.data(), ones.data(), n, kind, dx.data(), 2);
    double tail = 0, relative = 0, gradient = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double want = x[i] * share(x[i], kind), error = std::abs(y[i] - want);
      if (x[i] < -4) tail = std::max(tail, error);
      else relative = std::max(relative, want == 0 ? 0 : error / std::abs(want));
      gradient = std::max(gradient, std::abs(dx[i] - share(x[i], kind) - x[i] * slope(x[i], kind)));
    }
    CHECK(relative < std::ldexp(1.0, -19));
    CHECK(tail < std::ldexp(1.0, -30));
    CHECK(gradient < std::ldexp(1.0, -20));
  }
}

static void takes_every_length_and_number_of_threads() {
  Random random;
  for (int64_t n : {0, 1, 3, 4, 7, 8, 15, 16, 17, 33, 40000}) {
    const std::vector<float> x = random.vector(n, 3), dy = random.vector(n);
    for (Gelu kind : {Gelu::erf, Gelu::tanh}) {
      std::vector<float> y(n + 1, 7), dx(n + 1, 7), y3(n), dx3(n);
      gelu(x.data(), n, kind, y.data(), 1);
      gelu_gradient(x.data(), dy.data(), n, kind, dx.data(), 1);
      gelu(x.data(), n, kind, y3.data(), 3);
      gelu_gradient(x.data(), dy.data(), n, kind, dx3.data(), 3);
      CHECK(y[n] == 7 && dx[n] == 7);
      CHECK(std::equal(y3.begin(), y3.end(), y.begin()) && std::equal(dx3.begin(), dx3.end(), dx.begin()));
      for (int64_t i = 0; i < n; ++i) {
        CHECK(std::abs(y[i] - x[i] * share(x[i], kind)) < 1e-6);
        CHECK(std::abs(dx[i] - dy[i] * (share(x[i], kind) + x[i] * slope(x[i], kind))) < 1e-6);
      }
    }
  }
}

static void large_numbers_and_nan_stay_what_they_are() {
  const std::vector<float> x{1e4f, 1e20f, 3e38f, -1e4f, -1e20f, NAN}, ones(6, 1);
  for (Gelu kind : {Gelu::erf, Gelu::tanh}) {
    std::vector<float> y(6), dx(6);
    gelu(x.data(), 6, kind, y.data(), 1);
    gelu_gradient(x.data(), ones.data(), 6, kind, dx.data(), 1);
    for (int i = 0; i < 3; ++i) CHECK(y[i] == x[i] && dx[i] == 1);
    for (int i = 3; i < 5; ++i) CHECK(std::abs(y[i]) < 1e-16 && std::abs(dx[i]) < 1e-16);
    CHECK(std::isnan(y[5]) && std::isnan(dx[5]));
  }
}

int main() {
  at_every_level(is_as_exact_as_documented);
  at_every_level(takes_every_length_and_number_of_threads);
  at_every_level(large_numbers_and_nan_stay_what_they_are);
  return failures();
}
