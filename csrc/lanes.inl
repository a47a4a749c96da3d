// One register of floats: sixteen lanes with AVX-512, eight with AVX2, four with SSE2 or NEON.

constexpr int64_t kLanes = 4 << E2E_SIMD;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes)));

#define E2E_INLINE static inline __attribute__((always_inline))

E2E_INLINE Lanes fill(float value) { return Lanes{} + value; }

E2E_INLINE Lanes load(const float* p) {
  Lanes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

E2E_INLINE void store(float* p, Lanes v) { __builtin_memcpy(p, &v, sizeof v); }

/// store() past the caches, for results larger than they are; p must be aligned to the register.
E2E_INLINE void stream(float* p, Lanes v) {
#if E2E_SIMD == 2
  _mm512_stream_ps(p, (__m512)v);
#elif E2E_SIMD == 1
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

/// The first n < kLanes numbers at p; the other lanes hold `rest`.
E2E_INLINE Lanes load_part(const float* p, int64_t n, float rest) {
  Lanes v = fill(rest);
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}

E2E_INLINE void store_part(float* p, Lanes v, int64_t n) {
  __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}

E2E_INLINE Lanes greater(Lanes a, Lanes b) { return a < b ? b : a; }  // keeps `a` where b is NaN

E2E_INLINE Lanes absolute(Lanes v) { return (Lanes)((IntLanes)v & 0x7fffffff); }

/// By halves: from a loop over lanes gcc 12 makes stores and narrower loads, which wait for each other.
E2E_INLINE float sum(Lanes v) {
#if E2E_SIMD == 2
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const auto eight = v;
#endif
#if E2E_SIMD >= 1
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const auto four = eight;
#endif
  const auto two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}

E2E_INLINE float largest(Lanes v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = m < v[i] ? v[i] : m;
  return m;
}

/// Bit i is set unless v[i] <= limit: NaN counts as above.
E2E_INLINE uint32_t not_below(Lanes v, float limit) {
#if E2E_SIMD == 2
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_NLE_UQ);
#elif E2E_SIMD == 1
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnle_ps((__m128)v, _mm_set1_ps(limit))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(v[i] <= limit)) << i;
  return bits;
#endif
}

/// Σ a[i] b[i]; its order depends on n and the level alone.
E2E_INLINE float dot(const float* a, const float* b, int64_t n) {
  Lanes s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
    s2 += load(a + i + 2 * kLanes) * load(b + i + 2 * kLanes);
    s3 += load(a + i + 3 * kLanes) * load(b + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += load(a + i) * load(b + i);
  if (i < n) s1 += load_part(a + i, n - i, 0) * load_part(b + i, n - i, 0);
  return sum((s0 + s1) + (s2 + s3));
}

/// The same of a row that fills R registers.
template <int R>
E2E_INLINE float dot(const float* a, const float* b) {
  Lanes s[R];
  for (int r = 0; r < R; ++r) s[r] = load(a + r * kLanes) * load(b + r * kLanes);
  for (int half = R / 2; half; half /= 2)
    for (int r = 0; r < half; ++r) s[r] += s[r + half];
  return sum(s[0]);
}

/// y += c x
E2E_INLINE void add_scaled(float* y, float c, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + c * load(x + i));
  if (i < n) store_part(y + i, load_part(y + i, n - i, 0) + c * load_part(x + i, n - i, 0), n - i);
}

/// Runs `narrow<R>()` where a row of `width` fills R registers and few enough of them, else `wide()`.
template <class Narrow, class Wide>
E2E_INLINE void by_width(int64_t width, Narrow narrow, Wide wide) {
  if (width % kLanes) return wide();
  switch (width / kLanes) {
    case 1: return narrow.template operator()<1>();
    case 2: return narrow.template operator()<2>();
    case 4: return narrow.template operator()<4>();
    case 8: return narrow.template operator()<8>();
    default: return wide();
  }
}
