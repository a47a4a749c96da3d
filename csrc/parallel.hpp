/// Dynamic parallel loop over std::thread, for the matching's sweeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace e2e {

/// body(job, thread) for every job in [0, jobs), each job once, on at most `threads` threads; the first exception is
/// rethrown after all threads have stopped.
template <class Body>
void parallel_jobs(int64_t jobs, int threads, Body&& body) {
  const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(jobs, 1)));
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&](int thread) {
    try {
      for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) body(job, thread);
    } catch (...) {
      next.store(jobs);
      const std::lock_guard lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> team;
  for (int thread = 1; thread < workers; ++thread) team.emplace_back(work, thread);
  work(0);
  for (auto& member : team) member.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace e2e
