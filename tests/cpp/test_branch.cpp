// Branches against the definition in double, at sizes that fit no register, at every SIMD level.
#include "branch.hpp"

#include <cmath>
#include <cstdlib>
#include <memory>

#include "check.hpp"

using namespace e2e;

struct Case {
  int64_t N, D, F, O;  // O = 0: no second layer
  bool norm, residual, transposed;
  Gelu gelu;
  std::vector<float> x, gain, shift, W1, b1, W2, b2, stream;

  Linear layer(const std::vector<float>& W, int64_t outputs, int64_t inputs, const std::vector<float>& b) const {
    return {
        W.data(), outputs, inputs, transposed ? 1 : inputs, transposed ? outputs : 1, b.empty() ? nullptr : b.data()};
  }
  int64_t outputs() const { return O ? O : F; }

  std::vector<float> run(int threads) const {
    std::vector<float> y(N * outputs(), NAN);
    Branch job{x.data(), N, {}, layer(W1, F, D, b1), gelu, {}, residual ? stream.data() : nullptr, y.data()};
    if (norm) job.norm = Norm{gain.data(), shift.data(), 1e-5f};
    if (O) job.second = layer(W2, O, F, b2);
    const int64_t bytes = (branch_scratch(job, threads) * 4 + 63) / 64 * 64;
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, bytes), std::free);
    branch(job, static_cast<float*>(scratch.get()), threads);
    return y;
  }

  std::vector<double> definition() const {
    std::vector<double> y;
    const auto apply = [&](const Linear& layer, const std::vector<double>& in) {
      std::vector<double> out(layer.outputs);
      for (int64_t r = 0; r < layer.outputs; ++r) {
        out[r] = layer.bias ? layer.bias[r] : 0;
        for (int64_t d = 0; d < layer.inputs; ++d)
          out[r] += in[d] * static_cast<double>(layer.weight[r * layer.row + d * layer.column]);
      }
      return out;
    };
    for (int64_t n = 0; n < N; ++n) {
      std::vector<double> h(x.begin() + n * D, x.begin() + (n + 1) * D);
      if (norm) {
        double mean = 0, variance = 0;
        for (double v : h) mean += v / D;
        for (double v : h) variance += (v - mean) * (v - mean) / D;
        for (int64_t d = 0; d < D; ++d) h[d] = (h[d] - mean) / std::sqrt(variance + 1e-5) * gain[d] + shift[d];
      }
      h = apply(layer(W1, F, D, b1), h);
      if (O) {
        for (double& v : h)
          v *= gelu == Gelu::erf ? 0.5 * std::erfc(-v / std::sqrt(2.0))
                                 : 1 / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
        h = apply(layer(W2, O, F, b2), h);
      }
      for (size_t i = 0; i < h.size(); ++i) y.push_back(h[i] + (residual ? stream[n * outputs() + i] : 0));
    }
    return y;
  }
};

static Case random_case(int64_t N, int64_t D, int64_t F, int64_t O, int options) {
  Random random;
  const int64_t outputs = O ? O : F;
  const bool biased = options & 8;
  return {N,
          D,
          F,
          O,
          (options & 1) != 0,
          (options & 2) != 0,
          (options & 4) != 0,
          options & 16 ? Gelu::erf : Gelu::tanh,
          random.vector(N * D, 2),
          random.vector(D),
          random.vector(D),
          random.vector(F * D),
          random.vector(biased ? F : 0),
          random.vector(O * F),
          random.vector(biased ? O : 0),
          random.vector(N * outputs)};
}

static void matches_the_definition() {
  for (int options = 0; options < 32; ++options)
    for (int64_t N : {1, 17, 49})
      for (int64_t D : {1, 5, 16, 19})
        for (int64_t O : {0, 3, 16}) {
          const Case c = random_case(N, D, 21, O, options);
          const auto got = c.run(2);
          const auto want = c.definition();
          CHECK(got.size() == want.size());
          for (size_t i = 0; i < want.size(); ++i) CHECK(std::abs(got[i] - want[i]) < 2e-5 * (1 + std::abs(want[i])));
        }
}

static void is_the_same_for_any_number_of_threads() {
  const Case c = random_case(301, 24, 50, 24, 15);
  const auto one = c.run(1);
  CHECK(c.run(2) == one);
  CHECK(c.run(7) == one);
}

static void no_tokens_are_no_work() { CHECK(random_case(0, 8, 9, 8, 3).run(2).empty()); }

int main() {
  at_every_level(matches_the_definition);
  at_every_level(is_the_same_for_any_number_of_threads);
  at_every_level(no_tokens_are_no_work);
  return failures();
}
