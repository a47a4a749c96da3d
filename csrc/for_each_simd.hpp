/// Includes the file named by E2E_KERNELS once for each instruction set, each time inside its own namespace
/// (e2e::baseline, e2e::avx2, e2e::avx512) and compiled for it. The file sees E2E_SIMD = 0, 1 or 2 and `lanes.inl`.
/// Standard headers must be included before: their inline functions have to stay baseline code.
///
/// E2E_DISPATCH(f, arguments…) calls f of the level in use (`simd_level`).

namespace e2e::baseline {
#define E2E_SIMD 0
#include "lanes.inl"
#include E2E_KERNELS
#undef E2E_SIMD
}  // namespace e2e::baseline

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace e2e::avx2 {
#define E2E_SIMD 1
#include "lanes.inl"
#include E2E_KERNELS
#undef E2E_SIMD
}  // namespace e2e::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace e2e::avx512 {
#define E2E_SIMD 2
#include "lanes.inl"
#include E2E_KERNELS
#undef E2E_SIMD
}  // namespace e2e::avx512
#pragma GCC pop_options

#define E2E_DISPATCH(f, ...)                                \
  (simd_level() == Simd::avx512 ? avx512::f(__VA_ARGS__)    \
   : simd_level() == Simd::avx2 ? avx2::f(__VA_ARGS__)      \
                                : baseline::f(__VA_ARGS__))

#else
#define E2E_DISPATCH(f, ...) baseline::f(__VA_ARGS__)
#endif
