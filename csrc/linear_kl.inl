/// A block of tokens goes over W twice, a chunk of its rows at a time. The first time
///
///   z = W h + b      m ← max(m, z)      T = Σ e^(t - m_t)      S = Σ e^(s - m_s)      C = Σ e^(t - m_t) ((t - m_t) -
///   (s - m_s))
///
/// with sums carried over to each new maximum m; the exponentials are kept, and the maxima they refer to. Then
///
///   KL = C / T + log S - log T        dz = e^(s - m_s) / S - e^(t - m_t) / T        dh += Wᵀ dz
///
/// Tokens stand in lanes: B registers of them are a block, and everything of a block lies transposed, [row][token].
/// Maxima, sums and exponentials then never cross lanes, and W is read as it lies in memory.

#if E2E_SIMD == 2 || defined(__aarch64__)
constexpr int64_t kRows = 8;  // of W: times B ≤ 3 registers of tokens they fill a register file of 32
#else
constexpr int64_t kRows = 4;  // of 16
#endif
constexpr int64_t kChunk = 128;      // rows of W between two looks at the maxima
constexpr int64_t kAhead = 12;       // rows of W fetched before their use
constexpr int64_t kLine = 16;        // floats of a cache line
constexpr float kLowest = -3.4e38f;  // the reference before any logit was seen
constexpr float kLeast = -70;        // of exponents that put a chunk's terms to the final maximum

#include "elementary.inl"

/// `whole` for every full register at i in [0, n), then `tail` for the last m < kLanes numbers.
#define E2E_EACH_REGISTER(i, n, whole, tail) \
  int64_t i = 0;                             \
  for (; i + kLanes <= (n); i += kLanes) {   \
    whole;                                   \
  }                                          \
  if (i < (n)) {                             \
    const int64_t m = (n) - i;               \
    tail;                                    \
  }

static void exp_all(const float* x, float* y, int64_t n) {
  E2E_EACH_REGISTER(i, n, store(y + i, exp(load(x + i))), store_part(y + i, exp(load_part(x + i, m, 0)), m))
}

static void tanh_all(const float* x, float* y, int64_t n) {
  E2E_EACH_REGISTER(i, n, store(y + i, tanh(load(x + i))), store_part(y + i, tanh(load_part(x + i, m, 0)), m))
}

#undef E2E_EACH_REGISTER

// --- Products -------------------------------------------------------------------------------------------------------

/// z[r, :] = Σ_d w[r, d] h[d, :] + bias[r] for R rows of w, D long each, and B registers of tokens. `soon` (R·B
/// registers) will be written next: its lines are fetched meanwhile.
template <int R, int B>
E2E_INLINE void logits_tile(const float* w, const float* bias, const float* h, int64_t D, float* z, const float* soon) {
  Lanes sum[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) sum[r][b] = Lanes{};
  for (int64_t d = 0; d < D; ++d) {
    __builtin_prefetch(w + R * (D + d));  // the next tile's rows
    __builtin_prefetch(soon + (d < R * B ? d : 0) * kLanes, 1);
    Lanes x[B];
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) x[b] = load(h + (d * B + b) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes c = fill(w[r * D + d]);
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) sum[r][b] += c * x[b];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) store(z + (r * B + b) * kLanes, sum[r][b] + (bias ? bias[r] : 0));
}

/// The logits [rows][tokens] of `rows` rows of W.
template <int B>
E2E_INLINE void logits(const float* w, const float* bias, int64_t rows, const float* h, int64_t D, float* z,
                       const float* soon) {
  const auto tile = [&]<int R>(int64_t r) {
    const int64_t at = r * B * kLanes;
    logits_tile<R, B>(w + r * D, bias ? bias + r : nullptr, h, D, z + at, soon + at);
  };
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) tile.template operator()<kRows>(r);
  for (; r < rows; ++r) tile.template operator()<1>(r);
}

/// g[c, :] += Σ_r dz[r, :] w[r, c] for C columns of w, whose rows are D long. `soon` (one line a row) will be read
/// next.
template <int C, int B>
E2E_INLINE void gradient_tile(const float* w, int64_t rows, const float* dz, int64_t D, float* g, const float* soon) {
  Lanes sum[C][B];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) sum[c][b] = Lanes{};
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(w + (r + kAhead) * D);
    __builtin_prefetch(soon + r * kLine);
    Lanes x[B];
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) x[b] = load(dz + (r * B + b) * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Lanes a = fill(w[r * D + c]);
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) sum[c][b] += a * x[b];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      float* const at = g + (c * B + b) * kLanes;
      store(at, load(at) + sum[c][b]);
    }
}

/// Adds dzᵀ W of `rows` rows of W to g [D][tokens], and fetches the next chunk of e_t and s meanwhile.
template <int B>
E2E_INLINE void gradient(const float* w, int64_t rows, const float* dz, int64_t D, float* g, const float* next_t,
                         const float* next_s) {
  const int64_t lines = (B * kLanes + kLine - 1) / kLine;  // of one row of the next chunk
  const auto tile = [&]<int C>(int64_t c) {
    const int64_t turn = c / kRows, piece = turn % lines * rows * kLine;
    const float* const soon = turn < lines ? next_t + piece : turn < 2 * lines ? next_s + piece : w;
    gradient_tile<C, B>(w + c, rows, dz, D, g + c * B * kLanes, soon);
  };
  int64_t c = 0;
  for (; c + kRows <= D; c += kRows) tile.template operator()<kRows>(c);
  for (; c < D; ++c) tile.template operator()<1>(c);
}

// --- Online softmax -------------------------------------------------------------------------------------------------

/// A block's softmax while its logits arrive in chunks; sums are relative to a reference that only rises.
template <int B>
struct Softmax {
  static constexpr int kTokens = B * kLanes;
  alignas(64) double total[kTokens];     // Σ e^(z - reference)
  alignas(64) double cross[kTokens];     // a student's Σ e_t ((t - reference_t) - (s - reference_s))
  alignas(64) float reference[kTokens];  // the greatest logit so far
  alignas(64) float rise[kTokens];       // of the reference, by the last chunk
};

template <int B>
E2E_INLINE void start(Softmax<B>& softmax) {
  for (int i = 0; i < B * kLanes; ++i) {
    softmax.total[i] = softmax.cross[i] = 0;
    softmax.reference[i] = kLowest;
  }
}

/// Caps a chunk's logits in place, if so asked, and raises the reference to their maxima.
template <int B>
E2E_INLINE void see(Softmax<B>& softmax, float* z, int64_t rows, float softcap) {
  Lanes top[B];
  for (int b = 0; b < B; ++b) top[b] = load(softmax.reference + b * kLanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int b = 0; b < B; ++b) {
      float* const at = z + (r * B + b) * kLanes;
      if (softcap > 0) store(at, softcap * tanh(load(at) * (1 / softcap)));
      top[b] = greater(top[b], load(at));
    }
  for (int b = 0; b < B; ++b) {
    store(softmax.rise + b * kLanes, top[b] - load(softmax.reference + b * kLanes));
    store(softmax.reference + b * kLanes, top[b]);
  }
}

/// What terms relative to the reference before the last chunk are worth relative to the one after it.
template <int B>
E2E_INLINE void shrinkage(const Softmax<B>& softmax, float* factor) {
  for (int b = 0; b < B; ++b) store(factor + b * kLanes, exp(-load(softmax.rise + b * kLanes)));
}

template <int B>
E2E_INLINE void add(Softmax<B>& softmax, const Lanes (&sums)[B]) {
  alignas(64) float factor[B * kLanes], added[B * kLanes];
  shrinkage<B>(softmax, factor);
  for (int b = 0; b < B; ++b) store(added + b * kLanes, sums[b]);
  for (int i = 0; i < B * kLanes; ++i) softmax.total[i] = softmax.total[i] * factor[i] + added[i];
}

/// With references that rose by a (teacher) and b (student): cross ← e^-a (cross - (a - b) Σ e_t), plus the chunk's
/// terms.
template <int B>
E2E_INLINE void add_cross(const Softmax<B>& teacher, Softmax<B>& student, const Lanes (&sums)[B]) {
  alignas(64) float factor[B * kLanes], added[B * kLanes];
  shrinkage<B>(teacher, factor);
  for (int b = 0; b < B; ++b) store(added + b * kLanes, sums[b]);
  for (int i = 0; i < B * kLanes; ++i) {
    const double moved = student.cross[i] - static_cast<double>(teacher.rise[i] - student.rise[i]) * teacher.total[i];
    student.cross[i] = (factor[i] == 0 ? 0 : factor[i] * moved) + added[i];
  }
}

/// The teacher's chunk t [rows][tokens]: t ← t - reference, e_t = e^t, and its sums.
template <int B>
E2E_INLINE void teacher_chunk(const Softmax<B>& teacher, float* t, int64_t rows, float* e_t, Lanes (&sums)[B]) {
  Lanes reference[B];
  for (int b = 0; b < B; ++b) reference[b] = load(teacher.reference + b * kLanes), sums[b] = Lanes{};
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      const int64_t at = (r * B + b) * kLanes;
      const Lanes shifted = load(t + at) - reference[b], power = exp(shifted);
      store(t + at, shifted);
      store(e_t + at, power);
      sums[b] += power;
    }
}

/// A student's chunk s beside the teacher's t - reference and e_t: its sums, and kept = e^(s - reference), or s itself.
template <int B>
E2E_INLINE void student_chunk(const Softmax<B>& teacher, Softmax<B>& student, const float* t, const float* e_t,
                              const float* s, int64_t rows, bool keep_logits, float* kept) {
  Lanes reference[B], sums[B], cross[B];
  for (int b = 0; b < B; ++b) reference[b] = load(student.reference + b * kLanes), sums[b] = cross[b] = Lanes{};
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      const int64_t at = (r * B + b) * kLanes;
      const Lanes z = load(s + at), shifted = z - reference[b], power = exp(shifted), weight = load(e_t + at);
      sums[b] += power;
      cross[b] += weight == 0.f ? Lanes{} : weight * (load(t + at) - shifted);  // beside e_t = 0 may stand an infinity
      store(kept + at, keep_logits ? z : power);
    }
  add_cross<B>(teacher, student, cross);
  add<B>(student, sums);
}

/// Of a chunk with these references: p = e · factor, relative to the final sums.
template <int B>
E2E_INLINE Lanes to_probability(const Softmax<B>& softmax, const float* reference, int b) {
  Lanes inverse;
  for (int i = 0; i < kLanes; ++i) inverse[i] = static_cast<float>(1 / softmax.total[b * kLanes + i]);
  return exp(greater(fill(kLeast), load(reference + b * kLanes) - load(softmax.reference + b * kLanes))) * inverse;
}

/// dz = p_s - p_t of a chunk, [· (1 - (s / c)²)]: from e_t and e_s, with a cap c from e_t and s. Written so that equal
/// rows give exactly 0, whether or not the compiler fuses.
template <int B>
E2E_INLINE void differences(const Lanes (&ratio)[B], const Lanes (&scale)[B], const float* reference, const float* e_t,
                            const float* s, int64_t rows, float softcap, float* dz) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      const int64_t at = (r * B + b) * kLanes;
      if (softcap > 0) {
        const Lanes z = load(s + at), y = z * (1 / softcap);
        const Lanes e_s = exp(z - load(reference + b * kLanes));
        store(dz + at, (e_s - load(e_t + at) * ratio[b]) * scale[b] * (1.f - y * y));
      } else {
        store(dz + at, (load(s + at) - load(e_t + at) * ratio[b]) * scale[b]);
      }
    }
}

// --- A block of tokens ----------------------------------------------------------------------------------------------

/// Floats of scratch memory of one block of at most 3 registers.
static int64_t block_scratch(const LinearKl& job) {
  constexpr int64_t tokens = 3 * kLanes;
  const int64_t rows = 1 + job.S, chunks = (job.V + kChunk - 1) / kChunk, kept = job.dstudents ? job.V : kChunk;
  return tokens * ((rows + 1) * job.D + 2 * kChunk + rows * chunks + rows * kept) +
         rows * static_cast<int64_t>(sizeof(Softmax<3>) / sizeof(float));
}

/// h [D][tokens] from `count` rows; the lanes beyond hold zeros.
E2E_INLINE void transpose_in(const float* rows, int64_t count, int64_t D, int64_t tokens, float* h) {
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < tokens; ++n) h[d * tokens + n] = n < count ? rows[n * D + d] : 0;
}

/// The whole job for tokens [first, first + count), count ≤ B · kLanes.
template <int B>
static void kl_tokens(const LinearKl& job, int64_t first, int64_t count, float* scratch) {
  constexpr int64_t tokens = B * kLanes;
  const int64_t S = job.S, D = job.D, V = job.V, kept = job.dstudents ? V : kChunk;
  const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
  auto* const softmax = reinterpret_cast<Softmax<B>*>(take((1 + S) * sizeof(Softmax<B>) / sizeof(float)));
  float* const h = take((1 + S) * D * tokens);  // teacher, then students, [D][tokens] each
  float* const references = take((V + kChunk - 1) / kChunk * (1 + S) * tokens);  // of every chunk, in the same order
  float* const kept_rows = take((1 + S) * kept * tokens);  // e_t, then each student's e_s (or s), of V rows or a chunk
  float *const t = take(kChunk * tokens), *const s = take(kChunk * tokens);  // a chunk of logits; s later of dz
  float* const g = take(D * tokens);

  for (int64_t i = 0; i <= S; ++i) {
    start(softmax[i]);
    transpose_in((i ? job.students + (i - 1) * job.N * D : job.teacher) + first * D, count, D, tokens,
                 h + i * D * tokens);
  }
  for (int64_t v = 0; v < V; v += kChunk) {
    const int64_t rows = V - v < kChunk ? V - v : kChunk, offset = (job.dstudents ? v : 0) * tokens;
    const float *const w = job.weight + v * D, *const bias = job.bias ? job.bias + v : nullptr;
    float* const reference = references + v / kChunk * (1 + S) * tokens;
    Lanes teacher_sums[B]{};
    for (int64_t i = 0; i <= S; ++i) {
      float *const z = i ? s : t, *const keep = kept_rows + i * kept * tokens + offset;
      logits<B>(w, bias, rows, h + i * D * tokens, D, z, keep);
      see(softmax[i], z, rows, job.softcap);
      __builtin_memcpy(reference + i * tokens, softmax[i].reference, sizeof softmax[i].reference);
      if (i) student_chunk(softmax[0], softmax[i], t, kept_rows + offset, s, rows, job.softcap > 0, keep);
      else teacher_chunk(softmax[0], t, rows, keep, teacher_sums);
    }
    add(softmax[0], teacher_sums);  // last: the students' sums refer to the teacher's before this chunk
  }
  for (int64_t i = 1; i <= S; ++i) {
    for (int64_t n = 0; n < count; ++n)
      job.loss[(i - 1) * job.N + first + n] =
          static_cast<float>(softmax[i].cross[n] / softmax[0].total[n] + __builtin_log(softmax[i].total[n]) -
                             __builtin_log(softmax[0].total[n]));
    if (!job.dstudents) continue;
    __builtin_memset(g, 0, static_cast<size_t>(D * tokens) * sizeof(float));
    for (int64_t v = 0; v < V; v += kChunk) {
      const int64_t rows = V - v < kChunk ? V - v : kChunk;
      const float* const reference = references + v / kChunk * (1 + S) * tokens;
      Lanes ratio[B], scale[B];
      for (int b = 0; b < B; ++b) {
        scale[b] = to_probability(softmax[i], reference + i * tokens, b);
        ratio[b] = to_probability(softmax[0], reference, b) / scale[b];
      }
      const float *const e_t = kept_rows + v * tokens, *const e_s = e_t + i * kept * tokens;
      differences<B>(ratio, scale, reference + i * tokens, e_t, e_s, rows, job.softcap, s);
      gradient<B>(job.weight + v * D, rows, s, D, g, e_t + rows * tokens, e_s + rows * tokens);
    }
    float* const out = job.dstudents + ((i - 1) * job.N + first) * D;
    for (int64_t n = 0; n < count; ++n)
      for (int64_t d = 0; d < D; ++d) out[n * D + d] = g[d * tokens + n];
  }
}

/// `kl_tokens` with as many registers as count ≤ 3 · kLanes asks for.
static void kl_block(const LinearKl& job, int64_t first, int64_t count, float* scratch) {
  if (count <= kLanes) return kl_tokens<1>(job, first, count, scratch);
  if (count <= 2 * kLanes) return kl_tokens<2>(job, first, count, scratch);
  return kl_tokens<3>(job, first, count, scratch);
}

/// Tokens of a block: three registers, fewer where threads would go without work.
static int64_t block_tokens(int64_t tokens, int threads) {
  const int64_t registers = (tokens + threads * kLanes - 1) / (threads * kLanes);
  return kLanes * (registers < 1 ? 1 : registers > 3 ? 3 : registers);
}
