/// e^x: x = n·ln 2 + r, |r| ≤ ln 2 / 2, e^r by its Taylor polynomial of degree 7 (truncation below 2^-28), times 2^n.
E2E_INLINE Lanes exp(Lanes x) {
  constexpr float kRound = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer, in the low bits
  const Lanes clamped = x < -87.33654f ? fill(-87.33654f) : x;
  const Lanes shifted = clamped * 1.44269504f + kRound;
  const Lanes n = shifted - kRound;
  Lanes r = clamped - n * 0.693359375f;  // ln 2 in two parts; the first product is exact
  r = r + n * 2.12194440e-4f;
  Lanes p = fill(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.f;
  const Lanes scale = (Lanes)(((IntLanes)shifted << 23) + 0x3f800000);
  p *= scale;
  return x < -87.33654f ? Lanes{} : p;
}

/// tanh: an odd polynomial near 0 (where 1 - e would cancel), (1 - e) / (1 + e) with e = exp(-2|x|) elsewhere.
E2E_INLINE Lanes tanh(Lanes x) {
  const Lanes size = absolute(x);
  const Lanes e = exp(size * -2.f);
  const Lanes far = (1.f - e) / (1.f + e);
  const Lanes q = x * x;
  Lanes p = fill(-0.00886323552990219656f);  // Taylor: 1 - x²/3 + 2x⁴/15 - 17x⁶/315 + 62x⁸/2835 - 1382x¹⁰/155925
  p = p * q + 0.0218694885361552028f;
  p = p * q - 0.0539682539682539683f;
  p = p * q + 0.133333333333333333f;
  p = p * q - 0.333333333333333333f;
  const Lanes near = x + x * (q * p);
  const Lanes signed_far = (Lanes)((IntLanes)far | ((IntLanes)x & (int32_t)0x80000000));
  return size < 0.25f ? near : signed_far;
}

/// `whole` for every full register at i in [0, n), then `tail` for the last m < kLanes numbers.
#define E2E_EACH_REGISTER(i, n, whole, tail)          \
  int64_t i = 0;                                      \
  for (; i + kLanes <= (n); i += kLanes) { whole; }   \
  if (i < (n)) { const int64_t m = (n) - i; tail; }

static void exp_all(const float* x, float* y, int64_t n) {
  E2E_EACH_REGISTER(i, n, store(y + i, exp(load(x + i))), store_part(y + i, exp(load_part(x + i, m, 0)), m))
}

static void tanh_all(const float* x, float* y, int64_t n) {
  E2E_EACH_REGISTER(i, n, store(y + i, tanh(load(x + i))), store_part(y + i, tanh(load_part(x + i, m, 0)), m))
}

E2E_INLINE float row_max(const float* z, int64_t n) {
  Lanes m0 = fill(-INFINITY), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = greater(m0, load(z + i));
    m1 = greater(m1, load(z + i + kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) m0 = greater(m0, load(z + i));
  if (i < n) m1 = greater(m1, load_part(z + i, n - i, -INFINITY));
  return largest(greater(m0, m1));
}

E2E_INLINE Lanes cap(Lanes z, float limit, float inverse) { return limit * tanh(z * inverse); }

E2E_INLINE void cap_row(const float* z, int64_t n, float limit, float* capped) {
  const float inverse = 1 / limit;
  E2E_EACH_REGISTER(i, n, store(capped + i, cap(load(z + i), limit, inverse)),
                    store_part(capped + i, cap(load_part(z + i, m, 0), limit, inverse), m))
}

struct Sums {
  double teacher, student, cross;  // Σ e_t, Σ e_s, Σ e_t (t - s), all shifted by the rows' maxima
};

/// Adds one register of shifted logits to the sums; `t` and `s` become e_t and e_s.
E2E_INLINE void accumulate(Lanes& t, Lanes& s, Lanes& sum_t, Lanes& sum_s, Lanes& cross) {
  const Lanes gap = t - s;
  t = exp(t);
  s = exp(s);
  sum_t += t;
  sum_s += s;
  cross += t == 0.f ? Lanes{} : t * gap;  // e_t = 0 may stand beside t - s = -inf or NaN
}

/// The three sums; e_t = exp(t - max_t) goes to its own row, which may be t's, and e_s to `s` if so asked.
E2E_INLINE Sums row_sums(const float* t, float* s, int64_t n, float max_t, float max_s, bool keep_s, float* exp_t) {
  constexpr int64_t kSegment = 2048;
  Sums sums{0, 0, 0};
  for (int64_t start = 0; start < n; start += kSegment) {
    const int64_t end = n - start < kSegment ? n : start + kSegment;
    Lanes sum_t{}, sum_s{}, cross{};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      Lanes e_t = load(t + i) - max_t, e_s = load(s + i) - max_s;
      accumulate(e_t, e_s, sum_t, sum_s, cross);
      store(exp_t + i, e_t);
      if (keep_s) store(s + i, e_s);
    }
    if (i < end) {
      Lanes e_t = load_part(t + i, end - i, -INFINITY) - max_t, e_s = load_part(s + i, end - i, -INFINITY) - max_s;
      accumulate(e_t, e_s, sum_t, sum_s, cross);
      store_part(exp_t + i, e_t, end - i);
      if (keep_s) store_part(s + i, e_s, end - i);
    }
    sums.teacher += sum(sum_t);
    sums.student += sum(sum_s);
    sums.cross += sum(cross);
  }
  return sums;
}

/// What the gradient of a row needs besides its two registers.
struct Gradient {
  float max_s, ratio, inverse, cap_inverse;  // ratio = Σe_s / Σe_t, inverse = 1 / Σe_s, cap_inverse = 0 without a cap
};

/// (e_s - e_t · ratio) · inverse [· (1 - (s/c)²)]: written so that equal rows give exactly 0, fused or not. With a cap s is
/// the capped logit, else e_s already.
E2E_INLINE Lanes difference(Lanes e_t, Lanes s, const Gradient& row) {
  if (row.cap_inverse == 0) return (s - e_t * row.ratio) * row.inverse;
  const Lanes y = s * row.cap_inverse;
  return (exp(s - row.max_s) - e_t * row.ratio) * row.inverse * (1.f - y * y);
}

E2E_INLINE void row_gradient(const float* e_t, float* s, int64_t n, const Gradient& row) {
  E2E_EACH_REGISTER(i, n, store(s + i, difference(load(e_t + i), load(s + i), row)),
                    store_part(s + i, difference(load_part(e_t + i, m, 0), load_part(s + i, m, 0), row), m))
}

/// One row; returns its loss. `scratch` (n) is overwritten.
static float softmax_kl_row(const float* t, float* s, int64_t n, float softcap, bool need_grad, float* scratch) {
  if (softcap > 0) {
    cap_row(t, n, softcap, scratch);
    cap_row(s, n, softcap, s);
    t = scratch;
  }
  const float max_t = row_max(t, n), max_s = row_max(s, n);
  const Sums sums = row_sums(t, s, n, max_t, max_s, need_grad && softcap <= 0, scratch);  // a cap needs s again
  if (need_grad)
    row_gradient(scratch, s, n,
                 {max_s, static_cast<float>(sums.student / sums.teacher), static_cast<float>(1 / sums.student),
                  softcap > 0 ? 1 / softcap : 0});
  return static_cast<float>(sums.cross / sums.teacher + __builtin_log(sums.student) - __builtin_log(sums.teacher));
}
#undef E2E_EACH_REGISTER
