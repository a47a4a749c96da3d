#include "elementary.inl"

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
