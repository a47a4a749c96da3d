/// The smallest test harness that does: CHECK counts failures and goes on; main returns `failures()`.
#pragma once

#include <cstdio>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "simd.hpp"

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                        \
    }                                                                      \
  } while (0)

/// Runs `test` at every SIMD level that this processor has.
inline void at_every_level(const std::function<void()>& test) {
  for (e2e::Simd level : {e2e::Simd::baseline, e2e::Simd::avx2, e2e::Simd::avx512}) {
    if (level > e2e::simd_best()) continue;
    e2e::simd_force(level);
    test();
  }
  e2e::simd_force(e2e::simd_best());
}

/// Reproducible numbers in [-1, 1).
class Random {
 public:
  float next() {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<float>(static_cast<double>(state_ >> 11) / (1ULL << 52) - 1.0);
  }
  std::vector<float> vector(size_t n, float scale = 1) {
    std::vector<float> v(n);
    for (float& x : v) x = scale * next();
    return v;
  }

 private:
  unsigned long long state_ = 42;
};

template <class Error>
bool throws(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error&) {
    return true;
  }
  return false;
}
