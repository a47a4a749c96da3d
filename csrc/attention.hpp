/// Causal softmax attention: every token attends to itself and to the tokens before it, or the last few of them.
#pragma once

#include <cstdint>

namespace e2e {

/// (B, heads, T, D) numbers in memory; those of a token and head are contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, token;  // strides, in elements

  T* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

/// With s[i, j] = scale · q_i · k_j, or cap(s) = softcap · tanh(s / softcap) of that, of every batch row and head:
///   out_i = Σ_j p[i, j] v_j      p[i, j] = e^s[i, j] / Σ_j' e^s[i, j']      inverse_i = 2^top_i / Σ_j' e^s[i, j']
/// Sums are over i - window < j ≤ i; elsewhere p is 0. Query head h reads key head h / (H / K).
struct Attention {
  Heads<const float> q, k, v;  // (B, H, T, D), (B, K, T, D), (B, K, T, D)
  int64_t B, H, K, T, D;
  float scale;
  int64_t window;    // ≥ 1; T and more: all tokens before
  float softcap;     // 0: none
  Heads<float> out;  // (B, H, T, D)
  float* top;        // (B, H, T): the greatest score in units of ln 2, or 0 where all are small
  float* inverse;    // (B, H, T): 1 / the sum of exponentials
};

/// From `out`, `top`, `inverse` and the gradient g of out:
///   dv_j = Σ_i p[i, j] g_i      ds[i, j] = p[i, j] (g_i · v_j - g_i · out_i) cap'(s[i, j])
///   dq_i = scale Σ_j ds[i, j] k_j      dk_j = scale Σ_i ds[i, j] q_i
struct AttentionGradient {
  Attention of;
  Heads<const float> dout;
  Heads<float> dq, dk, dv;
};

/// Floats of scratch memory that `attention` and `attention_gradient` want for `threads` threads.
int64_t attention_scratch(const Attention& job, bool gradient, int threads);

/// `scratch` is aligned to 64 bytes. The result has the same bits for any number of threads. T²/2 pairs, two products
/// of D and an exponential each. NaN and infinities of a token may reach the up to 47 tokens before it, and, where
/// scores may be beyond ±31, its numbers the rounding there.
void attention(const Attention& job, float* scratch, int threads);

/// The same for the gradient: five products and an exponential a pair. A thread takes a key head of a batch row.
void attention_gradient(const AttentionGradient& job, float* scratch, int threads);

}  // namespace e2e
