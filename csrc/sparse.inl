/// Puts into `found` the entries of scores[0, n) that are not <= limit; returns how many.
static int64_t scan_scores(const float* scores, int64_t n, float limit, int32_t first, Candidate* found) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    uint32_t bits = not_below(m == kLanes ? load(scores + i) : load_part(scores + i, m, 0), limit);
    if (m < kLanes) bits &= (1u << m) - 1;
    for (; bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      found[count++] = {scores[at], scores[at], first + static_cast<int32_t>(at)};
    }
  }
  return count;
}

static float row_scale(const float* w, int64_t n) {
  const float norm = __builtin_sqrtf(dot(w, w, n));
  return 1 / (norm < 1e-12f ? 1e-12f : norm);
}

/// The scale of row j, measured by whoever needs it first: 0 until then. Others may do the same meanwhile; all find one
/// number. Only these few writes go to memory that other cores read.
E2E_INLINE float scale_of(float* scale, int64_t j, const float* w, int64_t n) {
  float s;
  __atomic_load(scale + j, &s, __ATOMIC_RELAXED);
  if (__builtin_expect(s == 0, 0)) {
    s = row_scale(w, n);
    __atomic_store(scale + j, &s, __ATOMIC_RELAXED);
  }
  return s;
}

E2E_INLINE bool unused(float value, bool keep_negative) { return keep_negative ? value == 0 : value <= 0; }

/// y = bias + Σ_k values[k] scale[j] weight[j]
E2E_INLINE void decode_row(const float* values, const int32_t* indices, int64_t slots, const float* weight,
                           int64_t width, float* scale, const float* bias, bool keep_negative, float* y) {
  if (bias) __builtin_memcpy(y, bias, static_cast<size_t>(width) * sizeof(float));
  else __builtin_memset(y, 0, static_cast<size_t>(width) * sizeof(float));
  for (int64_t k = 0; k < slots; ++k) {
    if (unused(values[k], keep_negative)) continue;
    if (k + 1 < slots) {
      const char* ahead = reinterpret_cast<const char*>(weight + static_cast<int64_t>(indices[k + 1]) * width);
      const int64_t bytes = width * 4 < 1024 ? width * 4 : 1024;
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
    }
    const float* const w = weight + static_cast<int64_t>(indices[k]) * width;
    add_scaled(y, scale ? values[k] * scale_of(scale, indices[k], w, width) : values[k], w, width);
  }
}

/// The same with y in R registers.
template <int R>
E2E_INLINE void decode_row(const float* values, const int32_t* indices, int64_t slots, const float* weight,
                           float* scale, const float* bias, bool keep_negative, float* y) {
  Lanes sum[R];
  for (int r = 0; r < R; ++r) sum[r] = bias ? load(bias + r * kLanes) : Lanes{};
  for (int64_t k = 0; k < slots; ++k) {
    if (unused(values[k], keep_negative)) continue;
    const float* const w = weight + static_cast<int64_t>(indices[k]) * (R * kLanes);
    const float c = scale ? values[k] * scale_of(scale, indices[k], w, R * kLanes) : values[k];
    for (int r = 0; r < R; ++r) sum[r] += c * load(w + r * kLanes);
  }
  for (int r = 0; r < R; ++r) store(y + r * kLanes, sum[r]);
}

static void decode_rows(const float* values, const int32_t* indices, int64_t rows, int64_t slots, const float* weight,
                        int64_t width, float* scale, const float* bias, bool keep_negative, float* y) {
  const auto each = [&](const auto& row) __attribute__((always_inline)) {
    for (int64_t n = 0; n < rows; ++n) row(values + n * slots, indices + n * slots, y + n * width);
  };
  by_width(
      width,
      [&]<int R>() __attribute__((always_inline)) {
        each([&](const float* v, const int32_t* j, float* out) __attribute__((always_inline)) {
          decode_row<R>(v, j, slots, weight, scale, bias, keep_negative, out);
        });
      },
      [&]() __attribute__((always_inline)) {
        each([&](const float* v, const int32_t* j, float* out) __attribute__((always_inline)) {
          decode_row(v, j, slots, weight, width, scale, bias, keep_negative, out);
        });
      });
}

/// y += c x and the dot of x with w, reading x once.
E2E_INLINE float dot_and_add(float* y, float c, const float* x, const float* w, int64_t n) {
  Lanes s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Lanes a = load(x + i), b = load(x + i + kLanes);
    s0 += a * load(w + i);
    s1 += b * load(w + i + kLanes);
    store(y + i, load(y + i) + c * a);
    store(y + i + kLanes, load(y + i + kLanes) + c * b);
  }
  for (; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    const Lanes a = load_part(x + i, m, 0);
    s0 += a * load_part(w + i, m, 0);
    store_part(y + i, load_part(y + i, m, 0) + c * a, m);
  }
  return sum(s0 + s1);
}

/// y = x, past the caches if so asked.
E2E_INLINE void write_row(float* y, const float* x, int64_t n, bool past_caches) {
  if (!past_caches) {
    __builtin_memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) stream(y + i, load(x + i));
}

/// The share of the row w that its gradient's projection takes away. Rows shorter than 1e-12 were divided by that
/// constant: nothing is projected out of theirs.
E2E_INLINE float share_along(float product, float s) { return s < 1e12f ? product * s * s : 0; }

/// Feature j with its slots, tokens ascending. Sums are formed in `scratch` (2 D), and written to the results' rows
/// once.
E2E_INLINE void backward_wide(const Backward& job, int64_t j, const Slot* slots, int64_t n, bool past_caches,
                              float* scratch) {
  const int64_t D = job.width;
  float* const a = job.dW_dec ? scratch : nullptr;
  float* const e = job.dW_enc ? scratch + D : nullptr;
  __builtin_memset(scratch, 0, static_cast<size_t>(2 * D) * sizeof(float));
  const float* const w = job.g ? job.W_dec + j * D : nullptr;
  const float s = w && n && job.normalize ? row_scale(w, D) : 1;
  float db = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = slots[i].token, slot = token * job.slots + slots[i].place;
    float dv = job.dvalue_in(token, slots[i].place);
    if (w) {
      const float* const g = job.g + token * D;
      dv += s * (a ? dot_and_add(a, slots[i].value, g, w, D) : dot(g, w, D));
    }
    if (job.dvalues) job.dvalues[slot] = dv;
    db += dv;
    if (e) add_scaled(e, dv, job.x + token * D, D);
  }
  if (a && n && job.normalize) {
    const float along = share_along(dot(a, w, D), s);
    for (int64_t i = 0; i < D; i += kLanes) {
      const int64_t m = D - i < kLanes ? D - i : kLanes;
      store_part(a + i, (load_part(a + i, m, 0) - along * load_part(w + i, m, 0)) * s, m);
    }
  }
  if (a) write_row(job.dW_dec + j * D, a, D, past_caches);
  if (e) write_row(job.dW_enc + j * D, e, D, past_caches);
  if (e) job.db_enc[j] = db;
}

/// The same with the row of W_dec and both sums in R registers each; all of g, x, dW_dec and dW_enc are there.
template <int R>
E2E_INLINE void backward_narrow(const Backward& job, int64_t j, const Slot* slots, int64_t n) {
  constexpr int64_t D = R * kLanes;
  constexpr int64_t kAhead = 4;  // slots whose rows are fetched before their turn
  const float* const row = job.W_dec + j * D;
  const float s = n && job.normalize ? row_scale(row, D) : 1;
  Lanes w[R], a[R], e[R];
  for (int r = 0; r < R; ++r) w[r] = load(row + r * kLanes), a[r] = e[r] = Lanes{};
  float db = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = slots[i].token;
    const int64_t later = slots[i + kAhead < n ? i + kAhead : n - 1].token * D;
    for (int64_t line = 0; line < D; line += 16) {
      __builtin_prefetch(job.g + later + line);
      __builtin_prefetch(job.x + later + line);
    }
    const float *const g = job.g + token * D, *const x = job.x + token * D;
    Lanes product{};
    for (int r = 0; r < R; ++r) {
      const Lanes v = load(g + r * kLanes);
      product += v * w[r];
      a[r] += slots[i].value * v;
    }
    const float dv = job.dvalue_in(token, slots[i].place) + s * sum(product);
    if (job.dvalues) job.dvalues[token * job.slots + slots[i].place] = dv;
    db += dv;
    for (int r = 0; r < R; ++r) e[r] += dv * load(x + r * kLanes);
  }
  if (n && job.normalize) {
    Lanes product{};
    for (int r = 0; r < R; ++r) product += a[r] * w[r];
    const float along = share_along(sum(product), s);
    for (int r = 0; r < R; ++r) a[r] = (a[r] - along * w[r]) * s;
  }
  for (int r = 0; r < R; ++r)
    store(job.dW_dec + j * D + r * kLanes, a[r]), store(job.dW_enc + j * D + r * kLanes, e[r]);
  job.db_enc[j] = db;
}

/// Features begin … end - 1, feature j with the slots start[j] … start[j + 1] - 1.
static void backward_features(const Backward& job, int64_t begin, int64_t end, const Slot* slots, const int64_t* start,
                              bool past_caches, float* scratch) {
  const auto wide = [&]() __attribute__((always_inline)) {
    for (int64_t j = begin; j < end; ++j)
      backward_wide(job, j, slots + start[j], start[j + 1] - start[j], past_caches, scratch);
  };
  if (past_caches || !job.g || !job.x || !job.dW_dec || !job.dW_enc) return wide();
  by_width(
      job.width,
      [&]<int R>() __attribute__((always_inline)) {
        for (int64_t j = begin; j < end; ++j) backward_narrow<R>(job, j, slots + start[j], start[j + 1] - start[j]);
      },
      wide);
}

/// Makes streamed stores visible to other threads.
static void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
