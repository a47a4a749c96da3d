/// The Gaussian error linear unit and its gradient, one pass each.
#pragma once

#include <cstdint>

namespace e2e {

enum class Gelu {
  erf,   // x · Φ(x), Φ the normal distribution
  tanh,  // x · ½ (1 + tanh(√(2/π) (x + 0.044715 x³)))
};

/// y[i] = gelu(x[i]), n of them. Error below 2^-19 of the result, or below 2^-30 where x < -4.
void gelu(const float* x, int64_t n, Gelu kind, float* y, int threads);

/// dx[i] = dy[i] · gelu'(x[i]). Error of gelu' below 2^-20.
void gelu_gradient(const float* x, const float* dy, int64_t n, Gelu kind, float* dx, int threads);

}  // namespace e2e
