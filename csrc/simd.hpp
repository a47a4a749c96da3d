/// Which instruction set the hot loops run with: chosen at run time, and forcible for tests.
#pragma once

#include <string>

#if defined(__x86_64__)
#define E2E_X86 1
/// Compiles a function once for each instruction set; the loader chooses.
#define E2E_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define E2E_X86 0
#define E2E_CLONES
#endif

namespace e2e {

enum class Simd { baseline = 0, avx2 = 1, avx512 = 2 };

/// The best level this processor has.
Simd simd_best();

/// The level in use: `simd_best()` unless `simd_force` lowered it.
Simd simd_level();

/// Use `level` from now on; throws std::invalid_argument when the processor lacks it.
void simd_force(Simd level);

/// "baseline", "avx2" or "avx512".
std::string simd_name(Simd level);

}  // namespace e2e
