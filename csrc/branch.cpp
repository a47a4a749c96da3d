#include "branch.hpp"

#include <algorithm>
#include <cmath>

#include "simd.hpp"
#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define E2E_KERNELS "branch.inl"
#include "for_each_simd.hpp"

namespace e2e {

int64_t branch_scratch(const Branch& job, int threads) {
  return std::max(threads, 1) * E2E_DISPATCH(tile_scratch, job);
}

void branch(const Branch& job, float* scratch, int threads) {
  const int64_t tokens = E2E_DISPATCH(tile_tokens), each = E2E_DISPATCH(tile_scratch, job);
  parallel_jobs((job.N + tokens - 1) / tokens, threads, [&](int64_t tile, int slot) {
    const int64_t first = tile * tokens;
    E2E_DISPATCH(run_tile, job, first, std::min(tokens, job.N - first), scratch + slot * each);
  });
}

}  // namespace e2e
