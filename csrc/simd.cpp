#include "simd.hpp"

#include <atomic>
#include <stdexcept>

namespace e2e {

Simd simd_best() {
#if defined(__x86_64__)
  static const Simd best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Simd::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::avx2;
    return Simd::baseline;
  }();
  return best;
#else
  return Simd::baseline;
#endif
}

static std::atomic<int> forced{-1};

Simd simd_level() {
  const int level = forced.load(std::memory_order_relaxed);
  return level < 0 ? simd_best() : static_cast<Simd>(level);
}

void simd_force(Simd level) {
  if (level > simd_best())
    throw std::invalid_argument("this processor has no " + simd_name(level) + ": its best level is " +
                                simd_name(simd_best()));
  forced.store(static_cast<int>(level), std::memory_order_relaxed);
}

std::string simd_name(Simd level) {
  switch (level) {
    case Simd::avx512: return "avx512";
    case Simd::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace e2e
