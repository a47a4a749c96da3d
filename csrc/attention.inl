/// A block of queries stands in lanes, B registers wide, everything of it transposed: q [d][query], scores [key][query],
/// sums [d][query]. Keys and values are broadcast, so that maxima, sums and exponentials never cross lanes. Keys come in
/// chunks that stay in the caches, up to the last one that the block may see:
///
///   s = K q      m' = max(m, s)      p = e^(s - m')      total = e^(m - m') total + Σ p      o = e^(m - m') o + Vᵀ p
///
/// The gradient knows lse, so p = e^(s - lse) comes at once, beside ds = p (V g - g·out). Its sums over queries
/// (dk, dv) have channels in lanes instead, and broadcast p and ds.

#include "elementary.inl"

#if E2E_SIMD == 2 || defined(__aarch64__)
constexpr int64_t kRows = 8;  // broadcast by a tile: times B ≤ 3 registers they fill a register file of 32
#else
constexpr int64_t kRows = 4;  // of 16
#endif
constexpr int64_t kKeys = 64;          // of a chunk
constexpr float kLowest = -3.4e38f;    // the score of a key that may not be seen

static int64_t query_tokens() { return 3 * kLanes; }

/// D rounded up to whole registers: the length of a row of scratch memory.
static int64_t padded(int64_t D) { return (D + kLanes - 1) / kLanes * kLanes; }

/// Floats of scratch memory of one thread.
static int64_t thread_scratch(const Attention& job, bool gradient) {
  const int64_t P = padded(job.D), block = 3 * kLanes;
  return gradient ? 4 * job.T * P + 5 * block * P + 2 * kKeys * block + 2 * block
                  : 2 * job.T * P + 2 * block * P + kKeys * block;
}

// --- Layouts --------------------------------------------------------------------------------------------------------

/// Rows to columns: a perfect shuffle of all numbers, once for every bit of a lane's number.
E2E_INLINE void transpose(Lanes (&rows)[kLanes]) {
  IntLanes low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int turn = 1; turn < kLanes; turn *= 2) {
    Lanes next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

/// columns [d][token] = scale · rows[token, d] of `count` tokens; the lanes beyond and rows [D, padded(D)) hold zeros.
template <int B>
static void transpose_in(const float* rows, int64_t stride, int64_t count, int64_t D, float scale, float* columns) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t d = 0; d < D; d += kLanes) {
      Lanes m[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* const row = rows + (b * kLanes + i) * stride + d;
        m[i] = b * kLanes + i >= count ? Lanes{} : d + kLanes <= D ? load(row) : load_part(row, D - d, 0);
      }
      transpose(m);
      for (int64_t i = 0; i < kLanes; ++i) store(columns + ((d + i) * B + b) * kLanes, m[i] * scale);
    }
}

/// rows[token, d] = columns [d][token] · factor[token] of `count` tokens.
template <int B>
static void transpose_out(const float* columns, const Lanes (&factor)[B], int64_t count, int64_t D, float* rows,
                          int64_t stride) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t d = 0; d < D; d += kLanes) {
      Lanes m[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) m[i] = load(columns + ((d + i) * B + b) * kLanes) * factor[b];
      transpose(m);
      for (int64_t i = 0; i < kLanes && b * kLanes + i < count; ++i) {
        float* const row = rows + (b * kLanes + i) * stride + d;
        if (d + kLanes <= D) store(row, m[i]);
        else store_part(row, m[i], D - d);
      }
    }
}

/// packed [n][padded(D)] = scale · rows[n, :], zeros beyond D.
static void pack(const float* rows, int64_t stride, int64_t count, int64_t D, float scale, float* packed) {
  const int64_t P = padded(D);
  for (int64_t n = 0; n < count; ++n)
    for (int64_t d = 0; d < D; d += kLanes) {
      const float* const from = rows + n * stride + d;
      store(packed + n * P + d, (d + kLanes <= D ? load(from) : load_part(from, D - d, 0)) * scale);
    }
}

static void unpack(const float* packed, int64_t count, int64_t D, float* rows, int64_t stride) {
  for (int64_t n = 0; n < count; ++n)
    __builtin_memcpy(rows + n * stride, packed + n * padded(D), static_cast<size_t>(D) * sizeof(float));
}

// --- Products -------------------------------------------------------------------------------------------------------

/// out [r, b] = Σ_d rows[r, d] columns[d, b] for R rows, P apart, and B registers of columns.
template <int R, int B>
E2E_INLINE void row_tile(const float* rows, int64_t P, const float* columns, int64_t D, float* out) {
  Lanes sum[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) sum[r][b] = Lanes{};
  for (int64_t d = 0; d < D; ++d) {
    Lanes x[B];
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) x[b] = load(columns + (d * B + b) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes c = fill(rows[r * P + d]);
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) sum[r][b] += c * x[b];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) store(out + (r * B + b) * kLanes, sum[r][b]);
}

/// The same for all of `count` rows.
template <int B>
E2E_INLINE void row_products(const float* rows, int64_t count, int64_t P, const float* columns, int64_t D, float* out) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) row_tile<kRows, B>(rows + r * P, P, columns, D, out + r * B * kLanes);
  for (; r < count; ++r) row_tile<1, B>(rows + r * P, P, columns, D, out + r * B * kLanes);
}

/// sums[d, :] += Σ_r rows[r, d] columns[r, :] for d in [0, padded(D)), a multiple of kRows; `count` rows, P apart.
template <int B>
E2E_INLINE void column_products(const float* rows, int64_t count, int64_t P, const float* columns, float* sums) {
  for (int64_t d = 0; d < P; d += kRows) {
    Lanes sum[kRows][B];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) sum[i][b] = load(sums + ((d + i) * B + b) * kLanes);
    for (int64_t r = 0; r < count; ++r) {
      Lanes x[B];
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) x[b] = load(columns + (r * B + b) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Lanes c = fill(rows[r * P + d + i]);
#pragma GCC unroll 3
        for (int b = 0; b < B; ++b) sum[i][b] += c * x[b];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) store(sums + ((d + i) * B + b) * kLanes, sum[i][b]);
  }
}

/// sums[r, d] += Σ_n weights[r, n] rows[n, d] for R rows of weights, `tokens` apart, and C registers of channels.
template <int R, int C>
E2E_INLINE void outer_tile(const float* weights, int64_t tokens, const float* rows, int64_t count, int64_t P, float* sums) {
  Lanes sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) sum[r][c] = load(sums + r * P + c * kLanes);
  for (int64_t n = 0; n < count; ++n) {
    Lanes x[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) x[c] = load(rows + n * P + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes w = fill(weights[r * tokens + n]);
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) sum[r][c] += w * x[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) store(sums + r * P + c * kLanes, sum[r][c]);
}

/// The same for `keys` rows of weights and all of P channels.
E2E_INLINE void outer_products(const float* weights, int64_t keys, int64_t tokens, const float* rows, int64_t count,
                               int64_t P, float* sums) {
  const auto channels = [&]<int C>(int64_t d) {
    int64_t r = 0;
    for (; r + kRows <= keys; r += kRows)
      outer_tile<kRows, C>(weights + r * tokens, tokens, rows + d, count, P, sums + r * P + d);
    for (; r < keys; ++r) outer_tile<1, C>(weights + r * tokens, tokens, rows + d, count, P, sums + r * P + d);
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= P; d += 2 * kLanes) channels.template operator()<2>(d);
  if (d < P) channels.template operator()<1>(d);
}

// --- Forward --------------------------------------------------------------------------------------------------------

/// Scores [key][query] of keys [key, key + n) that a query of [first, …) may not see become kLowest.
template <int B>
E2E_INLINE void hide(float* s, int64_t n, int64_t key, int64_t first) {
  for (int64_t r = key < first ? first - key : 0; r < n; ++r)
    for (int64_t i = 0; i < key + r - first && i < B * kLanes; ++i) s[r * B * kLanes + i] = kLowest;
}

/// Queries [first, first + count) of one head, count ≤ B · kLanes, against packed keys and values.
template <int B>
static void attend_block(const Attention& job, int64_t b, int64_t h, int64_t first, int64_t count, const float* keys,
                         const float* values, float* scratch) {
  const int64_t P = padded(job.D), end = first + count;
  float *const q = scratch, *const sums = q + B * kLanes * P, *const s = sums + B * kLanes * P;
  transpose_in<B>(job.q.row(b, h, first), job.q.token, count, job.D, job.scale, q);
  __builtin_memset(sums, 0, static_cast<size_t>(B * kLanes * P) * sizeof(float));
  Lanes top[B], total[B];
  for (int i = 0; i < B; ++i) top[i] = fill(kLowest), total[i] = Lanes{};
  for (int64_t key = 0; key < end; key += kKeys) {
    const int64_t n = end - key < kKeys ? end - key : kKeys;
    const bool all_seen = key + n - 1 <= first;
    row_products<B>(keys + key * P, n, P, q, job.D, s);
    if (!all_seen) hide<B>(s, n, key, first);
    Lanes highest[B];
    for (int i = 0; i < B; ++i) highest[i] = top[i];
    for (int64_t r = 0; r < n; ++r)
#pragma GCC unroll 3
      for (int i = 0; i < B; ++i) highest[i] = greater(highest[i], load(s + (r * B + i) * kLanes));
    Lanes shrink[B];
    for (int i = 0; i < B; ++i) {
      shrink[i] = exp(top[i] - highest[i]);
      total[i] *= shrink[i];
      top[i] = highest[i];
    }
    if (key > 0)
      for (int64_t d = 0; d < P; ++d)
        for (int i = 0; i < B; ++i) store(sums + (d * B + i) * kLanes, load(sums + (d * B + i) * kLanes) * shrink[i]);
    for (int64_t r = 0; r < n; ++r)
#pragma GCC unroll 3
      for (int i = 0; i < B; ++i) {
        float* const at = s + (r * B + i) * kLanes;
        const Lanes p = exp(load(at) - top[i]);
        total[i] += p;
        store(at, p);
      }
    column_products<B>(values + key * P, n, P, s, sums);
  }
  Lanes inverse[B];
  for (int i = 0; i < B; ++i) inverse[i] = 1.f / total[i];
  transpose_out<B>(sums, inverse, count, job.D, job.out.row(b, h, first), job.out.token);
  float* const lse = job.lse + (b * job.H + h) * job.T + first;
  for (int64_t n = 0; n < count; ++n)
    lse[n] = top[n / kLanes][n % kLanes] + __builtin_logf(total[n / kLanes][n % kLanes]);
}

/// Queries [first, end) of all heads that read key head k of batch row b.
static void attend(const Attention& job, int64_t b, int64_t k, int64_t first, int64_t end, float* scratch) {
  const int64_t P = padded(job.D), group = job.H / job.K;
  float *const keys = scratch, *const values = keys + job.T * P, *const rest = values + job.T * P;
  pack(job.k.row(b, k, 0), job.k.token, end, job.D, 1, keys);
  pack(job.v.row(b, k, 0), job.v.token, end, job.D, 1, values);
  for (int64_t h = k * group; h < (k + 1) * group; ++h)
    for (int64_t t = first; t < end; t += 3 * kLanes) {
      const int64_t count = end - t;
      if (count <= kLanes) attend_block<1>(job, b, h, t, count, keys, values, rest);
      else if (count <= 2 * kLanes) attend_block<2>(job, b, h, t, count, keys, values, rest);
      else attend_block<3>(job, b, h, t, count < 3 * kLanes ? count : 3 * kLanes, keys, values, rest);
    }
}

// --- Gradient -------------------------------------------------------------------------------------------------------

/// One thread's memory while it works on a key head: rows of P floats.
struct KeyHead {
  float *keys, *values, *dkeys, *dvalues;  // [T][P]
  float* block;                            // of a block of queries
};

/// The part of queries [first, first + count) of one head: their dq, and their terms of dk and dv.
template <int B>
static void gradient_block(const AttentionGradient& job, int64_t b, int64_t h, int64_t first, int64_t count,
                           const KeyHead& head) {
  const Attention& of = job.of;
  constexpr int64_t tokens = B * kLanes;
  const int64_t P = padded(of.D), end = first + count;
  float* next = head.block;
  const auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
  float *const q = take(tokens * P), *const g = take(tokens * P), *const dq = take(tokens * P);  // [d][query]
  float *const q_rows = take(tokens * P), *const g_rows = take(tokens * P);                      // [query][P]
  float *const p = take(kKeys * tokens), *const ds = take(kKeys * tokens);                       // [key][query]
  float *const lse_of = take(tokens), *const mean_of = take(tokens);
  const float *const queries = of.q.row(b, h, first), *const gradients = job.dout.row(b, h, first);
  transpose_in<B>(queries, of.q.token, count, of.D, of.scale, q);
  transpose_in<B>(gradients, job.dout.token, count, of.D, 1, g);
  pack(queries, of.q.token, count, of.D, of.scale, q_rows);
  pack(gradients, job.dout.token, count, of.D, 1, g_rows);
  __builtin_memset(dq, 0, static_cast<size_t>(tokens * P) * sizeof(float));
  for (int64_t n = 0; n < tokens; ++n) {
    lse_of[n] = n < count ? of.lse[(b * of.H + h) * of.T + first + n] : 0;
    mean_of[n] = n < count ? dot(gradients + n * job.dout.token, of.out.row(b, h, first + n), of.D) : 0;
  }
  Lanes lse[B], mean[B];
  for (int i = 0; i < B; ++i) lse[i] = load(lse_of + i * kLanes), mean[i] = load(mean_of + i * kLanes);
  for (int64_t key = 0; key < end; key += kKeys) {
    const int64_t n = end - key < kKeys ? end - key : kKeys;
    const bool all_seen = key + n - 1 <= first;
    const float *const keys = head.keys + key * P, *const values = head.values + key * P;
    row_products<B>(keys, n, P, q, of.D, p);
    if (!all_seen) hide<B>(p, n, key, first);
    row_products<B>(values, n, P, g, of.D, ds);
    for (int64_t r = 0; r < n; ++r)
#pragma GCC unroll 3
      for (int i = 0; i < B; ++i) {
        const int64_t at = (r * B + i) * kLanes;
        const Lanes weight = exp(load(p + at) - lse[i]);
        store(p + at, weight);
        store(ds + at, weight * (load(ds + at) - mean[i]));
      }
    column_products<B>(keys, n, P, ds, dq);
    outer_products(ds, n, tokens, q_rows, count, P, head.dkeys + key * P);
    outer_products(p, n, tokens, g_rows, count, P, head.dvalues + key * P);
  }
  Lanes scale[B];
  for (int i = 0; i < B; ++i) scale[i] = fill(of.scale);
  transpose_out<B>(dq, scale, count, of.D, job.dq.row(b, h, first), job.dq.token);
}

/// The gradient of key head k of batch row b and of all heads that read it.
static void gradient(const AttentionGradient& job, int64_t b, int64_t k, float* scratch) {
  const Attention& of = job.of;
  const int64_t P = padded(of.D), size = of.T * P, group = of.H / of.K;
  const KeyHead head{scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, scratch + 4 * size};
  pack(of.k.row(b, k, 0), of.k.token, of.T, of.D, 1, head.keys);
  pack(of.v.row(b, k, 0), of.v.token, of.T, of.D, 1, head.values);
  __builtin_memset(head.dkeys, 0, static_cast<size_t>(2 * size) * sizeof(float));
  for (int64_t h = k * group; h < (k + 1) * group; ++h)
    for (int64_t t = 0; t < of.T; t += 3 * kLanes) {
      const int64_t count = of.T - t;
      if (count <= kLanes) gradient_block<1>(job, b, h, t, count, head);
      else if (count <= 2 * kLanes) gradient_block<2>(job, b, h, t, count, head);
      else gradient_block<3>(job, b, h, t, count < 3 * kLanes ? count : 3 * kLanes, head);
    }
  unpack(head.dkeys, of.T, of.D, job.dk.row(b, k, 0), job.dk.token);
  unpack(head.dvalues, of.T, of.D, job.dv.row(b, k, 0), job.dv.token);
}
