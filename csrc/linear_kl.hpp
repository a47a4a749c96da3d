/// KL(teacher ‖ student) over the vocabulary straight from hidden states: logits live for one block of tokens only.
#pragma once

#include <cstdint>

namespace e2e {

/// For every token n and student s, with z_t = W h_t + b, z_s = W h_s + b (softcap c > 0: z ← c·tanh(z / c)), p =
/// softmax:
///   loss[s, n] = Σ_v p_t (log p_t - log p_s)        dstudents[s, n] = Σ_v (p_s - p_t) [· (1 - (z_s / c)²)] W_v
struct LinearKl {
  const float* students;  // (S, N, D)
  const float* teacher;   // (N, D)
  const float* weight;    // (V, D)
  const float* bias;      // (V), or null
  int64_t S, N, D, V;
  float softcap;     // 0: none
  float* loss;       // (S, N)
  float* dstudents;  // (S, N, D), or null: then no gradient is made
};

/// Floats of scratch memory that `linear_kl` wants for `threads` threads.
int64_t linear_kl_scratch(const LinearKl& job, int threads);

/// All arrays contiguous. `scratch` is aligned to 64 bytes. A teacher logit of -inf has probability 0; NaN propagates
/// within its token. The result has the same bits for any number of threads. O(N · V · D): 1 + 2·S products, two
/// exponentials a logit pair; with a cap three, and two hyperbolic tangents.
void linear_kl(const LinearKl& job, float* scratch, int threads);

/// y[i] = exp(x[i]) for x ≤ 88, error below 2 ulp; below -87.3 the result is 0 instead of a subnormal.
void exp_lanes(const float* x, float* y, int64_t n);

/// y[i] = tanh(x[i]), error below 3 ulp.
void tanh_lanes(const float* x, float* y, int64_t n);

}  // namespace e2e
