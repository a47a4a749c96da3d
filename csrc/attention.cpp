#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "simd.hpp"
#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define E2E_KERNELS "attention.inl"
#include "for_each_simd.hpp"

namespace e2e {

namespace {

/// How the queries are dealt out: pieces of whole blocks, each by one thread with its own scratch memory.
struct Pieces {
  int64_t heads, count, tokens, scratch;
  int threads;

  Pieces(const Attention& job, bool gradient, int most_threads) {
    const int64_t block = E2E_DISPATCH(query_tokens), blocks = (job.T + block - 1) / block;
    heads = job.B * job.K;
    // Few heads are cut into pieces. A gradient is not: its sums over queries stay with one thread.
    const int64_t wanted = gradient || heads == 0 ? 1 : (4 * most_threads + heads - 1) / heads;
    tokens = block * ((blocks + std::min(wanted, blocks) - 1) / std::max<int64_t>(std::min(wanted, blocks), 1));
    count = tokens ? (job.T + tokens - 1) / tokens : 0;
    scratch = (E2E_DISPATCH(thread_scratch, job, gradient) + 15) / 16 * 16;
    threads = static_cast<int>(std::clamp<int64_t>(most_threads, 1, std::max<int64_t>(heads * count, 1)));
  }
};

}  // namespace

int64_t attention_scratch(const Attention& job, bool gradient, int threads) {
  const Pieces pieces(job, gradient, threads);
  return pieces.threads * pieces.scratch;
}

void attention(const Attention& job, float* scratch, int threads) {
  const Pieces pieces(job, false, threads);
  parallel_jobs(pieces.heads * pieces.count, pieces.threads, [&](int64_t index, int slot) {
    const int64_t head = index / pieces.count, first = index % pieces.count * pieces.tokens;
    E2E_DISPATCH(attend, job, head / job.K, head % job.K, first, std::min(job.T, first + pieces.tokens),
                 scratch + slot * pieces.scratch);
  });
}

void attention_gradient(const AttentionGradient& job, float* scratch, int threads) {
  const Pieces pieces(job.of, true, threads);
  if (job.of.T == 0) return;
  parallel_jobs(pieces.heads, pieces.threads, [&](int64_t head, int slot) {
    E2E_DISPATCH(gradient, job, head / job.of.K, head % job.of.K, scratch + slot * pieces.scratch);
  });
}

}  // namespace e2e
