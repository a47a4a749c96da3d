/// A pool of std::thread workers. torch brings its own OpenMP runtime; a second one in the process would fight it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace e2e {

/// Runs `body(begin, end)` over [0, count) in pieces of at most `grain`, on up to `threads` threads, the caller among
/// them. Which thread takes which piece varies, so results must not depend on it. The first exception is rethrown.
/// One call runs at a time; a nested call runs on its own thread alone.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

/// `body(job, slot)` for every job in [0, jobs), each once. Of the slots [0, threads) each is one running body's alone:
/// the number of its scratch memory.
template <class Body>
void parallel_jobs(int64_t jobs, int threads, Body&& body) {
  const int slots = std::max(threads, 1);
  const std::unique_ptr<std::atomic_flag[]> taken(new std::atomic_flag[slots]());
  parallel_for(jobs, 1, slots, [&](int64_t begin, int64_t end) {
    struct Slot {
      std::atomic_flag* flags;
      int number = 0;
      Slot(std::atomic_flag* all, int count) : flags(all) {
        while (flags[number].test_and_set(std::memory_order_acquire)) number = (number + 1) % count;
      }
      ~Slot() { flags[number].clear(std::memory_order_release); }
    } slot(taken.get(), slots);
    for (int64_t job = begin; job < end; ++job) body(job, slot.number);
  });
}

}  // namespace e2e
