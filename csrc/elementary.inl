// exp, 2^x, tanh and GELU of a register of floats. Needs lanes.inl.

constexpr float kLog2E = 1.44269504f;
constexpr float kRound = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer, in the low bits

/// e^x: x = n·ln 2 + r, |r| ≤ ln 2 / 2, e^r = 1 + r + r² q(r) with the q of degree 4 whose greatest relative error is
/// least (2^-28; our fit), times 2^n.
E2E_INLINE Lanes exp(Lanes x) {
  constexpr float kSmallest = -87.33654f;  // below: 0 instead of a subnormal
  const Lanes shifted = x * kLog2E + kRound, n = shifted - kRound;
  Lanes r = x - n * 0.693359375f;  // ln 2 in two parts; the first product is exact
  r = r + n * 2.12194440e-4f;
  Lanes p = fill(0.001381454f);
  p = p * r + 0.008368745f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if E2E_SIMD == 2
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  return (Lanes)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
  p *= (Lanes)(((WordLanes)shifted << 23) + 0x3f800000u);
  return x < kSmallest ? Lanes{} : p;
#endif
}

/// 2^x for |x| ≤ 125: x = n + r, |r| ≤ ½, 2^r = 1 + r q(r) with the q of degree 5 whose greatest relative error is
/// least (2^-26 with its coefficients in float; our fit), and n added to the exponent's bits. Without exp's two
/// products by ln 2.
E2E_INLINE Lanes exp2_near(Lanes x) {
  const Lanes shifted = x + kRound, r = x - (shifted - kRound);
  Lanes p = fill(0.0001535336196f);
  p = p * r + 0.001339887502f;
  p = p * r + 0.009618436918f;
  p = p * r + 0.05550332367f;
  p = p * r + 0.2402264774f;
  p = p * r + 0.6931471825f;
  p = p * r + 1.f;
  return (Lanes)((WordLanes)p + ((WordLanes)shifted << 23));
}

/// 2^x for x ≤ 125; 0 instead of a subnormal.
E2E_INLINE Lanes exp2(Lanes x) { return x < -125.f ? Lanes{} : exp2_near(x); }

/// tanh x and its slope 1 - tanh² x.
struct Tanh {
  Lanes value, slope;
};

/// tanh: an odd polynomial near 0 (where 1 - e would cancel), (1 - e) / (1 + e) with e = exp(-2|x|) elsewhere. The
/// slope, 4 e / (1 + e)², keeps its digits where tanh is near ±1.
E2E_INLINE Tanh tanh_and_slope(Lanes x) {
  const Lanes size = absolute(x);
  const Lanes e = exp(size * -2.f), inverse = 1.f / (1.f + e);
  const Lanes far = (1.f - e) / (1.f + e);
  const Lanes q = x * x;
  Lanes p = fill(-0.00886323552990219656f);  // Taylor: 1 - x²/3 + 2x⁴/15 - 17x⁶/315 + 62x⁸/2835 - 1382x¹⁰/155925
  p = p * q + 0.0218694885361552028f;
  p = p * q - 0.0539682539682539683f;
  p = p * q + 0.133333333333333333f;
  p = p * q - 0.333333333333333333f;
  const Lanes near = x + x * (q * p);
  const Lanes signed_far = (Lanes)((IntLanes)far | ((IntLanes)x & (int32_t)0x80000000));
  return {size < 0.25f ? near : signed_far, 4.f * e * inverse * inverse};
}

E2E_INLINE Lanes tanh(Lanes x) { return tanh_and_slope(x).value; }

/// gelu(x) = x · share and gelu'(x) = share + change, change = x · share'.
struct Share {
  Lanes share, change;
};

/// share = Φ(x). With a = |x| the upper tail is 1 - Φ(a) = e^(-a²/2) t q(t), t = 1 / (1 + 0.3 a), where q is the
/// polynomial of degree 7 whose greatest relative error over a ≤ 10 is least (5e-8; our fit). share' = e^(-x²/2) /
/// √(2π).
E2E_INLINE Share share_erf(Lanes x) {
  const Lanes a = absolute(x), t = 1.f / (1.f + 0.3f * a), density = exp2(-0.72134752f * a * a);
  Lanes q = fill(0.037547987f);
  q = q * t - 0.16507731f;
  q = q * t + 0.22008486f;
  q = q * t - 0.066524126f;
  q = q * t + 0.13549629f;
  q = q * t + 0.097756095f;
  q = q * t + 0.12111121f;
  q = q * t + 0.11960504f;
  const Lanes tail = density * t * q;
  return {x < 0.f ? tail : 1.f - tail, density * x * 0.39894228f};
}

/// ½ (1 + tanh u) = 1 / (1 + e), e = e^(-2u), which keeps its digits where x < 0; share' = share² e · 2u'. Beyond
/// ±9.9, where share is 1e-37 or 1, all stays as it is there.
E2E_INLINE Share share_tanh(Lanes x) {
  constexpr float kTwice = 1.5957691f, kCubic = 0.044715f;  // 2 √(2/π)
  Lanes z = greater(x, fill(-9.9f));
  z = z > 9.9f ? fill(9.9f) : z;
  const Lanes square = z * z, e = exp2_near(z * (-kTwice * kLog2E - kTwice * kCubic * kLog2E * square));
  const Lanes share = 1.f / (1.f + e);
  return {share, share * e * share * z * (kTwice + 3 * kTwice * kCubic * square)};
}
