#include "softmax_kl.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.hpp"
#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define E2E_KERNELS "softmax_kl.inl"
#include "for_each_simd.hpp"

namespace e2e {

void softmax_kl_rows(const float* teacher, float* student, int64_t rows, int64_t columns, float softcap, bool need_grad,
                     float* loss, int threads) {
  std::vector<std::vector<float>> scratch(std::max(threads, 1));
  parallel_jobs(rows, threads, [&](int64_t r, int slot) {
    scratch[slot].resize(columns);
    loss[r] = E2E_DISPATCH(softmax_kl_row, teacher + r * columns, student + r * columns, columns, softcap, need_grad,
                           scratch[slot].data());
  });
}

void exp_lanes(const float* x, float* y, int64_t n) { E2E_DISPATCH(exp_all, x, y, n); }

void tanh_lanes(const float* x, float* y, int64_t n) { E2E_DISPATCH(tanh_all, x, y, n); }

}  // namespace e2e
