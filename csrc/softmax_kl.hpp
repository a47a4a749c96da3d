/// The row kernel of linear_kl: two softmax statistics, the loss and the gradient difference, row by row in cache.
#pragma once

#include <cstdint>

namespace e2e {

/// For logits t = teacher[r, :], s = student[r, :] (rows × columns, contiguous), p = softmax:
///   loss[r] = Σ_v p_t (log p_t - log p_s)      student[r, v] ← (p_s - p_t) · ds/dz     (with need_grad)
/// With softcap c > 0 both are first replaced by c·tanh(z / c), and ds/dz = 1 - (s / c)²; `student` is then overwritten in
/// any case. A teacher logit of -inf has probability 0; NaN propagates within its row. Sums are float32 within 2,048 columns
/// and float64 beyond. O(rows · columns), two exponentials a column pair, three with a cap.
void softmax_kl_rows(const float* teacher, float* student, int64_t rows, int64_t columns, float softcap, bool need_grad,
                     float* loss, int threads);

/// y[i] = exp(x[i]) for x ≤ 88, error below 2 ulp; below -87.3 the result is 0 instead of a subnormal.
void exp_lanes(const float* x, float* y, int64_t n);

/// y[i] = tanh(x[i]), error below 3 ulp.
void tanh_lanes(const float* x, float* y, int64_t n);

}  // namespace e2e
