/// Causal softmax attention: every token attends to itself and to the tokens before it.
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

/// With s[i, j] = scale · q_i · k_j, p[i, j] = e^(s[i, j] - lse_i) for j ≤ i and 0 beyond, of every batch row and head:
///   out_i = Σ_j p[i, j] v_j        lse_i = log Σ_{j ≤ i} e^s[i, j]
/// Query head h reads key head h / (H / K).
struct Attention {
  Heads<const float> q, k, v;  // (B, H, T, D), (B, K, T, D), (B, K, T, D)
  int64_t B, H, K, T, D;
  float scale;
  Heads<float> out;  // (B, H, T, D)
  float* lse;        // (B, H, T)
};

/// From `out`, `lse` and the gradient g of out:
///   dv_j = Σ_i p[i, j] g_i      ds[i, j] = p[i, j] (g_i · v_j - g_i · out_i)
///   dq_i = scale Σ_j ds[i, j] k_j      dk_j = scale Σ_i ds[i, j] q_i
struct AttentionGradient {
  Attention of;
  Heads<const float> dout;
  Heads<float> dq, dk, dv;
};

/// Floats of scratch memory that `attention` and `attention_gradient` want for `threads` threads.
int64_t attention_scratch(const Attention& job, bool gradient, int threads);

/// `scratch` is aligned to 64 bytes. The result has the same bits for any number of threads. T²/2 pairs, two products
/// of D and an exponential each. NaN and infinities of a token may reach the up to 47 tokens before it.
void attention(const Attention& job, float* scratch, int threads);

/// The same for the gradient: five products and an exponential a pair. A thread takes a key head of a batch row. lse is a
/// float, so p is known to 2^-23 of the greatest score.
void attention_gradient(const AttentionGradient& job, float* scratch, int threads);

}  // namespace e2e
