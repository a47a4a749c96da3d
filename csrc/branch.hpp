/// A branch of a frozen block in one pass over its tokens: norm, linear layer, GELU, linear layer, sum with the stream.
#pragma once

#include <cstdint>
#include <optional>

#include "gelu.hpp"

namespace e2e {

/// y = W x + b. W (outputs, inputs) with any strides, in elements.
struct Linear {
  const float* weight;
  int64_t outputs, inputs, row, column;
  const float* bias;  // (outputs) or null
};

/// LayerNorm: (x - mean) / sqrt(variance + eps) · gain + shift.
struct Norm {
  const float *gain, *shift;  // (D)
  float eps;
};

/// y = residual + second(gelu(first(norm(x)))) of every token; without second there is no GELU either.
struct Branch {
  const float* x;  // (N, first.inputs)
  int64_t N;
  std::optional<Norm> norm;
  Linear first;
  Gelu gelu;
  std::optional<Linear> second;
  const float* residual;  // (N, outputs) or null; may be x
  float* y;               // (N, outputs)
};

/// Floats of scratch memory that `branch` wants for `threads` threads.
int64_t branch_scratch(const Branch& job, int threads);

/// `scratch` is aligned to 64 bytes. The result has the same bits for any number of threads.
void branch(const Branch& job, float* scratch, int threads);

}  // namespace e2e
