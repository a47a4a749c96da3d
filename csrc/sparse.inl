/// Appends to `hits` the entries of scores[0, n) that are not <= limit; returns how many.
static int64_t scan_scores(const float* scores, int64_t n, float limit, int32_t first, Hit* hits) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    uint32_t bits = not_below(m == kLanes ? load(scores + i) : load_part(scores + i, m, 0), limit);
    if (m < kLanes) bits &= (1u << m) - 1;
    for (; bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      hits[found++] = {scores[at], scores[at], first + static_cast<int32_t>(at)};
    }
  }
  return found;
}

/// The first n <= kLanes bfloat16 numbers at p, as floats.
E2E_INLINE Lanes load_bfloat16(const uint16_t* p, int64_t n) {
  HalfLanes s{};
  __builtin_memcpy(&s, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return (Lanes)(__builtin_convertvector(s, WordLanes) << 16);
}

/// As scan_scores, from bfloat16 products: an entry is a hit unless its upper bound is <= limit.
static int64_t scan_screened(const uint16_t* scores, int64_t n, const float* bias, RowBound row, const float* norm,
                             const float* error_norm, float limit, int32_t first, Hit* hits) {
  constexpr float kStored = 0x1.02p-8f;  // the product was rounded to 8 bits, and this arithmetic rounds too
  constexpr float kBias = 0x1p-22f;
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    const bool whole = m == kLanes;
    const Lanes z = whole ? load_bfloat16(scores + i, kLanes) : load_bfloat16(scores + i, m);
    const Lanes c = !bias ? Lanes{} : whole ? load(bias + i) : load_part(bias + i, m, 0);
    const Lanes w = whole ? load(norm + i) : load_part(norm + i, m, 0);
    const Lanes e = whole ? load(error_norm + i) : load_part(error_norm + i, m, 0);
    const Lanes radius = row.a * w + row.b * e + absolute(z) * kStored + absolute(c) * kBias;
    const Lanes middle = z + c, upper = middle + radius;
    uint32_t bits = not_below(upper, limit);
    if (m < kLanes) bits &= (1u << m) - 1;
    if (!bits) continue;
    const Lanes lower = middle - radius;
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      hits[found++] = {upper[lane], lower[lane], first + static_cast<int32_t>(i) + lane};
    }
  }
  return found;
}

static float dot_rows(const float* a, const float* b, int64_t n) { return dot(a, b, n); }

/// Rounds a row to bfloat16; norms[0] = ‖x‖², norms[1] = ‖x - rounded‖².
static void round_row(const float* x, int64_t n, uint16_t* rounded, float* norms) {
  Lanes square{}, error{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    const Lanes v = m == kLanes ? load(x + i) : load_part(x + i, m, 0);
    const WordLanes bits = (WordLanes)v;
    const WordLanes even = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    const Lanes gap = v - (Lanes)even;
    square += v * v;
    error += gap * gap;
    const HalfLanes s = __builtin_convertvector(even >> 16, HalfLanes);
    __builtin_memcpy(rounded + i, &s, static_cast<size_t>(m) * sizeof(uint16_t));
  }
  norms[0] = sum(square);
  norms[1] = sum(error);
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

/// Feature j with its tokens: slots[0, n) are positions in the (N, K) arrays, ascending. Works in the rows of the
/// results themselves: they are zeroed first and stay zero for a feature without tokens.
static void backward_feature(const Backward& job, int64_t j, const int64_t* slots, int64_t n) {
  const int64_t D = job.width;
  float* const a = job.dW_dec ? job.dW_dec + j * D : nullptr;
  float* const e = job.dW_enc ? job.dW_enc + j * D : nullptr;
  if (a) __builtin_memset(a, 0, static_cast<size_t>(D) * sizeof(float));
  if (e) __builtin_memset(e, 0, static_cast<size_t>(D) * sizeof(float));
  const float* const w = job.g ? job.W_dec + j * D : nullptr;
  const float s = w && n && job.normalize ? row_scale(w, D) : 1;
  float db = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = slots[i], token = slot / job.slots;
    float dv = job.dvalues_in ? job.dvalues_in[slot] : 0;
    if (w) {
      const float* const g = job.g + token * D;
      dv += s * (a ? dot_and_add(a, job.values[slot], g, w, D) : dot(g, w, D));
    }
    job.dvalues[slot] = dv;
    db += dv;
    if (e) add_scaled(e, dv, job.x + token * D, D);
  }
  if (e) job.db_enc[j] = db;
  if (!a || !n || !job.normalize) return;
  // Rows shorter than 1e-12 were divided by that constant: nothing is projected out of theirs.
  const float along = s < 1e12f ? dot(a, w, D) * s * s : 0;
  for (int64_t i = 0; i < D; i += kLanes) {
    const int64_t m = D - i < kLanes ? D - i : kLanes;
    store_part(a + i, (load_part(a + i, m, 0) - along * load_part(w + i, m, 0)) * s, m);
  }
}
