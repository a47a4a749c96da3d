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

E2E_INLINE bool unused(float value, bool keep_negative) { return keep_negative ? value == 0 : value <= 0; }

static void decode_row(const float* values, const int32_t* indices, int64_t slots, const float* weight, int64_t width,
                       const float* scale, const float* bias, bool keep_negative, float* y) {
  if (bias)
    __builtin_memcpy(y, bias, static_cast<size_t>(width) * sizeof(float));
  else
    __builtin_memset(y, 0, static_cast<size_t>(width) * sizeof(float));
  for (int64_t k = 0; k < slots; ++k) {
    if (unused(values[k], keep_negative)) continue;
    if (k + 1 < slots) {
      const char* ahead = reinterpret_cast<const char*>(weight + static_cast<int64_t>(indices[k + 1]) * width);
      const int64_t bytes = width * 4 < 1024 ? width * 4 : 1024;
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
    }
    const float c = scale ? values[k] * scale[indices[k]] : values[k];
    add_scaled(y, c, weight + static_cast<int64_t>(indices[k]) * width, width);
  }
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

/// Feature j with its slots, tokens ascending. Sums are formed in `scratch` (2 D), and written to the results' rows once.
static void backward_feature(const Backward& job, int64_t j, const Slot* slots, int64_t n, bool past_caches,
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
    float dv = job.dvalues_in ? job.dvalues_in[slot] : 0;
    if (w) {
      const float* const g = job.g + token * D;
      dv += s * (a ? dot_and_add(a, job.values[slot], g, w, D) : dot(g, w, D));
    }
    job.dvalues[slot] = dv;
    db += dv;
    if (e) add_scaled(e, dv, job.x + token * D, D);
  }
  if (a && n && job.normalize) {
    // Rows shorter than 1e-12 were divided by that constant: nothing is projected out of theirs.
    const float along = s < 1e12f ? dot(a, w, D) * s * s : 0;
    for (int64_t i = 0; i < D; i += kLanes) {
      const int64_t m = D - i < kLanes ? D - i : kLanes;
      store_part(a + i, (load_part(a + i, m, 0) - along * load_part(w + i, m, 0)) * s, m);
    }
  }
  if (a) write_row(job.dW_dec + j * D, a, D, past_caches);
  if (e) write_row(job.dW_enc + j * D, e, D, past_caches);
  if (e) job.db_enc[j] = db;
}

/// Makes streamed stores visible to other threads.
static void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
