#include "gelu.hpp"

#include "simd.hpp"
#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define E2E_KERNELS "gelu.inl"
#include "for_each_simd.hpp"

namespace e2e {

constexpr int64_t kGrain = 1 << 14;  // numbers that a thread takes at a time

void gelu(const float* x, int64_t n, Gelu kind, float* y, int threads) {
  parallel_for(n, kGrain, threads,
               [&](int64_t begin, int64_t end) { E2E_DISPATCH(gelu_all, x + begin, end - begin, kind, y + begin); });
}

void gelu_gradient(const float* x, const float* dy, int64_t n, Gelu kind, float* dx, int threads) {
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    E2E_DISPATCH(gelu_gradient_all, x + begin, dy + begin, end - begin, kind, dx + begin);
  });
}

}  // namespace e2e
