#include "elementary.inl"

/// gelu(x) = x · share and gelu'(x) = share + change, change = x · share'.
struct Share {
  Lanes share, change;
};

/// share = Φ(x). With a = |x| the upper tail is 1 - Φ(a) = e^(-a²/2) t q(t), t = 1 / (1 + 0.3 a), where q is the polynomial
/// of degree 7 whose greatest relative error over a ≤ 10 is least (5e-8; our fit). share' = e^(-x²/2) / √(2π).
E2E_INLINE Share share_erf(Lanes x) {
  const Lanes a = absolute(x), t = 1.f / (1.f + 0.3f * a), density = exp(-0.5f * a * a);
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
  const Lanes square = z * z, e = exp(z * (-kTwice - kTwice * kCubic * square));
  const Lanes share = 1.f / (1.f + e);
  return {share, share * e * share * z * (kTwice + 3 * kTwice * kCubic * square)};
}

/// The kind is a constant, so that the loops below hold no choice.
template <Gelu kind>
E2E_INLINE Share share(Lanes x) {
  return kind == Gelu::erf ? share_erf(x) : share_tanh(x);
}

template <Gelu kind>
static void gelu_of(const float* x, int64_t n, float* y) {
  const auto f = [](Lanes v) __attribute__((always_inline)) { return v * share<kind>(v).share; };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i < n) store_part(y + i, f(load_part(x + i, n - i, 0)), n - i);
}

template <Gelu kind>
static void gelu_gradient_of(const float* x, const float* dy, int64_t n, float* dx) {
  const auto f = [](Lanes v, Lanes g) __attribute__((always_inline)) {
    const Share s = share<kind>(v);
    return g * (s.share + s.change);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dx + i, f(load(x + i), load(dy + i)));
  if (i < n) store_part(dx + i, f(load_part(x + i, n - i, 0), load_part(dy + i, n - i, 0)), n - i);
}

static void gelu_all(const float* x, int64_t n, Gelu kind, float* y) {
  kind == Gelu::erf ? gelu_of<Gelu::erf>(x, n, y) : gelu_of<Gelu::tanh>(x, n, y);
}

static void gelu_gradient_all(const float* x, const float* dy, int64_t n, Gelu kind, float* dx) {
  kind == Gelu::erf ? gelu_gradient_of<Gelu::erf>(x, dy, n, dx) : gelu_gradient_of<Gelu::tanh>(x, dy, n, dx);
}
