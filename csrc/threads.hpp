/// Loops on several threads: those of the OpenMP runtime that the process has loaded (torch's), else a pool of
/// std::thread.
///
/// OpenMP's threads spin for about a millisecond after a region. Threads of our own would have to wait for them to be
/// scheduled, and torch's next region for ours; loops on the same threads follow each other without a pause. The
/// runtime is looked up in the running process, so nothing is linked to it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace e2e {

enum class Runtime { own, openmp };

/// What loops run on: `own` where no OpenMP runtime is loaded, in forked children (an OpenMP runtime does not survive a
/// fork) and after `force_own_threads(true)`.
Runtime runtime();

/// For tests: `own` from now on, or again what was found.
void force_own_threads(bool own);

/// Runs `body(begin, end)` over [0, count) in pieces of at most `grain`, on up to `threads` threads, the caller among
/// them. A thread begins with its own share, which is the same for every loop of one length, and then helps others:
/// results must not depend on which thread takes which piece. The first exception is rethrown. Any number of callers; a
/// nested call runs on its own thread alone.
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
