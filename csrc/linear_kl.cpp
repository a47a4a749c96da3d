#include "linear_kl.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "simd.hpp"
#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define E2E_KERNELS "linear_kl.inl"
#include "for_each_simd.hpp"

namespace e2e {

namespace {

/// How the tokens are dealt out: blocks, each by one thread with its own scratch memory.
struct Blocks {
  int64_t tokens, count, scratch;
  int threads;

  Blocks(const LinearKl& job, int most_threads) {
    tokens = E2E_DISPATCH(block_tokens, job.N, std::max(most_threads, 1));
    count = (job.N + tokens - 1) / tokens;
    scratch = (E2E_DISPATCH(block_scratch, job) + 15) / 16 * 16;
    threads = static_cast<int>(std::clamp<int64_t>(most_threads, 1, std::max<int64_t>(count, 1)));
  }
};

}  // namespace

int64_t linear_kl_scratch(const LinearKl& job, int threads) {
  const Blocks blocks(job, threads);
  return blocks.threads * blocks.scratch;
}

void linear_kl(const LinearKl& job, float* scratch, int threads) {
  const Blocks blocks(job, threads);
  parallel_jobs(blocks.count, blocks.threads, [&](int64_t block, int slot) {
    const int64_t first = block * blocks.tokens;
    E2E_DISPATCH(kl_block, job, first, std::min(blocks.tokens, job.N - first), scratch + slot * blocks.scratch);
  });
}

void exp_lanes(const float* x, float* y, int64_t n) { E2E_DISPATCH(exp_all, x, y, n); }

void tanh_lanes(const float* x, float* y, int64_t n) { E2E_DISPATCH(tanh_all, x, y, n); }

}  // namespace e2e
