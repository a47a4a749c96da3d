/// A pool of std::thread workers. torch brings its own OpenMP runtime; a second one in the process would fight it.
#pragma once

#include <cstdint>
#include <functional>

namespace e2e {

/// Runs `body(begin, end)` over [0, count) in pieces of at most `grain`, on up to `threads` threads, the caller among
/// them. Which thread takes which piece varies, so results must not depend on it. The first exception is rethrown.
/// One call runs at a time; a nested call runs on its own thread alone.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace e2e
