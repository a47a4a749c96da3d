/// What every runtime must do: every piece once, exceptions come back, nesting and many callers are safe.
#pragma once

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "threads.hpp"

inline void loops_hold() {
  using e2e::parallel_for;
  for (int64_t count : {0, 1, 7, 1000})
    for (int64_t grain : {0, 1, 3, 5000})
      for (int threads : {0, 1, 2, 5}) {
        std::vector<std::atomic<int>> seen(count);
        parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++seen[i];
        });
        for (const auto& n : seen) CHECK(n == 1);
      }

  CHECK(throws<std::runtime_error>([] {
    parallel_for(100, 1, 3, [](int64_t begin, int64_t) {
      if (begin == 50) throw std::runtime_error("fifty");
    });
  }));
  std::atomic<int> after{0};
  parallel_for(10, 1, 3, [&](int64_t, int64_t) { ++after; });
  CHECK(after == 10);

  std::thread::id first;  // a thread begins with its own share, and the caller's is the first
  parallel_for(2, 1, 2, [&](int64_t begin, int64_t) {
    if (begin == 0) first = std::this_thread::get_id();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  });
  CHECK(first == std::this_thread::get_id());

  std::atomic<int> nested{0};
  parallel_for(8, 1, 3, [&](int64_t, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // so that the workers take part
    parallel_for(8, 1, 3, [&](int64_t, int64_t) { ++nested; });
  });
  CHECK(nested == 64);

  std::atomic<int> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) parallel_for(16, 1, 3, [&](int64_t, int64_t) { ++total; });
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(total == 4 * 200 * 16);

  std::vector<std::atomic_flag> busy(3);
  e2e::parallel_jobs(300, 3, [&](int64_t, int slot) {
    CHECK(!busy[slot].test_and_set());  // the slot's memory is this body's alone
    busy[slot].clear();
  });
}
