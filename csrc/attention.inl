/// A block of queries stands in lanes, kBlock of them in three registers, everything of it transposed: q [d][query],
/// scores [key][query], sums [d][query]. Keys and values are broadcast, so that maxima, sums and exponentials never
/// cross lanes. Keys come in chunks that stay in the caches; up to the block's first query all lanes see them, after it
/// a register's worth at a time with the registers that may see them. Scores are in units of ln 2:
///
///   s = K q      m' = max(m, s)      p = 2^(s - m')      total = 2^(m - m') total + Σ p      o = 2^(m - m') o + Vᵀ p
///
/// Where norms bound the scores (|s| ≤ |q| |k|) m is 0: there are no maxima and nothing to bring to new ones. The
/// gradient knows the last m and total, so p comes at once, beside ds = p (V g - g·out). Its sums over queries (dk, dv)
/// have channels in lanes instead, and broadcast p and ds.

#include "blocks.inl"
#include "elementary.inl"

constexpr int64_t kKeys = 64;        // of a chunk
constexpr float kLowest = -3.4e38f;  // the score of a key that may not be seen
constexpr float kBounded = 46;       // scores up to this need no maximum: 2^±46 leaves room for sums and values

static int64_t query_tokens() { return kBlock; }

/// f.operator()<B>() for a number of registers known at run time.
template <class F>
E2E_INLINE void with_registers(int64_t B, F&& f) {
  if (B == 1) f.template operator()<1>();
  else if (B == 2) f.template operator()<2>();
  else f.template operator()<3>();
}

/// Floats of scratch memory of one thread.
static int64_t thread_scratch(const Attention& job, bool gradient) {
  const int64_t P = padded(job.D);
  return gradient ? 4 * job.T * P + 5 * kBlock * P + 2 * kKeys * kBlock
                  : (2 * P + 1) * job.T + 2 * kBlock * P + kKeys * kBlock;
}

// --- Layouts --------------------------------------------------------------------------------------------------------

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

/// out [r, :] = Σ_d rows[r, d] columns[d, :] for `count` rows, P apart.
template <int B>
E2E_INLINE void row_products(const float* rows, int64_t count, int64_t P, const float* columns, int64_t D, float* out) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) row_tile<kRows, B>(rows + r * P, P, 1, columns, D, nullptr, out + r * kBlock);
  for (; r < count; ++r) row_tile<1, B>(rows + r * P, P, 1, columns, D, nullptr, out + r * kBlock);
}

/// sums[d, :] += Σ_r rows[r, d] columns[r, :] for d in [0, padded(D)), a multiple of kRows; `count` rows, P apart.
template <int B>
E2E_INLINE void column_products(const float* rows, int64_t count, int64_t P, const float* columns, float* sums) {
  for (int64_t d = 0; d < P; d += kRows) {
    Lanes sum[kRows][B];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) sum[i][b] = load(sums + (d + i) * kBlock + b * kLanes);
    for (int64_t r = 0; r < count; ++r) {
      Lanes x[B];
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) x[b] = load(columns + r * kBlock + b * kLanes);
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
      for (int b = 0; b < B; ++b) store(sums + (d + i) * kBlock + b * kLanes, sum[i][b]);
  }
}

/// sums[r, d] += Σ_n weights[r, n] rows[n, d] for R rows of weights, kBlock apart, and C registers of channels.
template <int R, int C>
E2E_INLINE void outer_tile(const float* weights, const float* rows, int64_t count, int64_t P, float* sums) {
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
      const Lanes w = fill(weights[r * kBlock + n]);
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
E2E_INLINE void outer_products(const float* weights, int64_t keys, const float* rows, int64_t count, int64_t P,
                               float* sums) {
  const auto channels = [&]<int C>(int64_t d) {
    int64_t r = 0;
    for (; r + kRows <= keys; r += kRows)
      outer_tile<kRows, C>(weights + r * kBlock, rows + d, count, P, sums + r * P + d);
    for (; r < keys; ++r) outer_tile<1, C>(weights + r * kBlock, rows + d, count, P, sums + r * P + d);
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= P; d += 2 * kLanes) channels.template operator()<2>(d);
  if (d < P) channels.template operator()<1>(d);
}

// --- Scores ---------------------------------------------------------------------------------------------------------

/// Keys [key, key + count) against the registers [c, c + B) of a block of queries.
struct Chunk {
  int64_t key, count, c, B;
  bool partly;  // some of these queries may not see some of these keys
};

/// The chunks that queries [first, first + count) see part of, ascending.
template <class F>
E2E_INLINE void each_chunk(const Attention& job, int64_t first, int64_t count, F&& f) {
  const int64_t registers = (count + kLanes - 1) / kLanes, end = first + count;
  const int64_t oldest = first - job.window + 1;  // that the first query sees
  for (int64_t key = oldest > 0 ? oldest / kRows * kRows : 0, n; key < end; key += n) {
    const bool before = key < first;
    const int64_t limit = before ? kKeys : kLanes, left = (before ? first : end) - key;
    const int64_t c = before ? 0 : (key - first) / kLanes;
    n = left < limit ? left : limit;
    f(Chunk{key, n, c, registers - c, !before || key < end - job.window});
  }
}

/// `weight` where the queries first, first + 1, … of a register may see the key, else `rest`.
E2E_INLINE Lanes where_seen(Lanes weight, Lanes rest, int64_t key, int64_t first, int64_t window) {
  IntLanes query;
  for (int i = 0; i < kLanes; ++i) query[i] = i;
  const int64_t own = key - first, beyond = own + window < kBlock ? own + window : kBlock;
  const int32_t begin = static_cast<int32_t>(own), end = static_cast<int32_t>(beyond);
  return (query >= begin) & (query < end) ? weight : rest;
}

/// s = cap · tanh(s): scores with a soft cap.
template <int B>
static void cap_scores(float* s, int64_t n, float cap) {
  for (int64_t r = 0; r < n; ++r)
    for (int b = 0; b < B; ++b) store(s + r * kBlock + b * kLanes, cap * tanh(load(s + r * kBlock + b * kLanes)));
}

/// What q is multiplied by, so that products with keys are scores in units of ln 2, or what tanh is taken of.
static float query_scale(const Attention& job) {
  return job.softcap > 0 ? job.scale / job.softcap : job.scale * kLog2E;
}

// --- Forward --------------------------------------------------------------------------------------------------------

/// Packed rows of a key head.
struct KeyHead {
  float *keys, *values;  // [T][P]
  float* norms;          // [T]: the greatest |k|² so far
};

/// A block of queries on its way through the keys.
struct Softmax {
  float *q, *sums, *s;  // [d][query], [d][query], [key][query]
  Lanes top[3], total[3];
};

/// Makes room for a chunk's scores: top becomes their maximum, sums and totals are brought to it.
template <int B>
static void raise_top(const Chunk& chunk, int64_t P, const float* s, Lanes* top, Lanes* total, float* sums) {
  Lanes highest[B], shrink[B];
  for (int b = 0; b < B; ++b) highest[b] = top[b];
  for (int64_t r = 0; r < chunk.count; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) highest[b] = greater(highest[b], load(s + r * kBlock + b * kLanes));
  for (int b = 0; b < B; ++b) {
    shrink[b] = exp2(top[b] - highest[b]);
    total[b] *= shrink[b];
    top[b] = highest[b];
  }
  for (int64_t d = 0; d < P; ++d)
    for (int b = 0; b < B; ++b) store(sums + d * kBlock + b * kLanes, load(sums + d * kBlock + b * kLanes) * shrink[b]);
}

/// Scores become p, which is added to the totals. Of `bounded` scores top is 0.
template <int B, bool bounded>
static void weigh(const Chunk& chunk, int64_t first, int64_t window, float* s, const Lanes* top, Lanes* total) {
  Lanes sum[B];
  for (int b = 0; b < B; ++b) sum[b] = total[b];
  for (int64_t r = 0; r < chunk.count; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      float* const at = s + r * kBlock + b * kLanes;
      Lanes p = bounded ? exp2_near(load(at)) : exp2(load(at) - top[b]);
      if (bounded && chunk.partly) p = where_seen(p, Lanes{}, chunk.key + r, first + b * kLanes, window);
      sum[b] += p;
      store(at, p);
    }
  for (int b = 0; b < B; ++b) total[b] = sum[b];
}

/// Takes in the chunk's part of the registers [c, c + B) of the block that begins at query `first`.
template <int B>
static void absorb(const Attention& job, const Chunk& chunk, int64_t first, bool bounded, const KeyHead& head,
                   Softmax& block) {
  const int64_t P = padded(job.D), at = chunk.c * kLanes;
  float *const s = block.s + at, *const sums = block.sums + at;
  Lanes *const top = block.top + chunk.c, *const total = block.total + chunk.c;
  row_products<B>(head.keys + chunk.key * P, chunk.count, P, block.q + at, job.D, s);
  if (job.softcap > 0) cap_scores<B>(s, chunk.count, job.softcap * kLog2E);
  if (bounded) {
    weigh<B, true>(chunk, first + at, job.window, s, top, total);
  } else {
    if (chunk.partly)
      for (int64_t r = 0; r < chunk.count; ++r)
        for (int b = 0; b < B; ++b) {
          float* const to = s + r * kBlock + b * kLanes;
          store(to, where_seen(load(to), fill(kLowest), chunk.key + r, first + at + b * kLanes, job.window));
        }
    raise_top<B>(chunk, P, s, top, total, sums);
    weigh<B, false>(chunk, first + at, job.window, s, top, total);
  }
  column_products<B>(head.values + chunk.key * P, chunk.count, P, s, sums);
}

/// Whether no score of these queries can be beyond ±kBounded; q [D][kBlock] is scaled. NaN is beyond.
static bool is_bounded(const Attention& job, const float* q, float key_norm) {
  if (job.softcap > 0) return job.softcap * kLog2E <= kBounded;
  Lanes norm[3]{};
  for (int64_t d = 0; d < job.D; ++d)
    for (int b = 0; b < 3; ++b) norm[b] += load(q + d * kBlock + b * kLanes) * load(q + d * kBlock + b * kLanes);
  bool all = true;
  for (int b = 0; b < 3; ++b)
    for (int i = 0; i < kLanes; ++i) all &= norm[b][i] * key_norm <= kBounded * kBounded;
  return all;
}

/// Queries [first, first + count) of one head, count ≤ kBlock.
static void attend_block(const Attention& job, int64_t b, int64_t h, int64_t first, int64_t count, const KeyHead& head,
                         float* scratch) {
  const int64_t P = padded(job.D);
  Softmax block{scratch, scratch + kBlock * P, scratch + 2 * kBlock * P, {}, {}};
  transpose_in(job.q.row(b, h, first), job.q.token, count, job.D, query_scale(job), block.q);
  __builtin_memset(block.sums, 0, static_cast<size_t>(kBlock * P) * sizeof(float));
  const bool bounded = is_bounded(job, block.q, head.norms[first + count - 1]);
  if (!bounded)
    for (Lanes& top : block.top) top = fill(kLowest);
  each_chunk(job, first, count, [&](const Chunk& chunk) {
    with_registers(chunk.B, [&]<int B>() { absorb<B>(job, chunk, first, bounded, head, block); });
  });
  Lanes inverse[3];
  for (int i = 0; i < 3; ++i) inverse[i] = 1.f / block.total[i];
  transpose_out(block.sums, inverse, count, job.D, job.out.row(b, h, first), job.out.token);
  const int64_t at = (b * job.H + h) * job.T + first;
  for (int64_t n = 0; n < count; ++n) {
    job.top[at + n] = block.top[n / kLanes][n % kLanes];
    job.inverse[at + n] = inverse[n / kLanes][n % kLanes];
  }
}

/// Queries [first, end) of all heads that read key head k of batch row b.
static void attend(const Attention& job, int64_t b, int64_t k, int64_t first, int64_t end, float* scratch) {
  const int64_t size = job.T * padded(job.D), group = job.H / job.K;
  float* const block = scratch + 2 * size;
  const KeyHead head{scratch, scratch + size, block + 2 * kBlock * padded(job.D) + kKeys * kBlock};
  pack(job.k.row(b, k, 0), job.k.token, end, job.D, 1, head.keys);
  pack(job.v.row(b, k, 0), job.v.token, end, job.D, 1, head.values);
  float greatest = 0;
  for (int64_t t = 0; t < end; ++t) {
    const float norm = dot(job.k.row(b, k, t), job.k.row(b, k, t), job.D);
    greatest = norm <= greatest ? greatest : norm;  // NaN stays
    head.norms[t] = greatest;
  }
  for (int64_t h = k * group; h < (k + 1) * group; ++h)
    for (int64_t t = first; t < end; t += kBlock)
      attend_block(job, b, h, t, end - t < kBlock ? end - t : kBlock, head, block);
}

// --- Gradient -------------------------------------------------------------------------------------------------------

/// One thread's memory while it works on a key head: rows of P floats.
struct KeyHeadGradient {
  float *keys, *values, *dkeys, *dvalues;  // [T][P]
  float* block;                            // of a block of queries
};

/// A block of queries with what its gradient starts from.
struct QueryGradient {
  float *q, *g, *dq;                  // [d][query]
  float *q_rows, *g_rows;             // [query][P]
  float *p, *ds;                      // [key][query]
  Lanes top[3], inverse[3], mean[3];  // mean: g · out
};

/// The chunk's part of dq, dk and dv of the registers [c, c + B) of the block of queries [first, first + count).
template <int B>
static void differentiate(const Attention& of, const Chunk& chunk, int64_t first, int64_t count,
                          const KeyHeadGradient& head, QueryGradient& block) {
  const int64_t P = padded(of.D), at = chunk.c * kLanes, n = chunk.count, rest = count - at;
  const float *const keys = head.keys + chunk.key * P, *const values = head.values + chunk.key * P;
  const float *const q_rows = block.q_rows + at * P, *const g_rows = block.g_rows + at * P;
  float *const p = block.p + at, *const ds = block.ds + at;
  const Lanes *const top = block.top + chunk.c, *const inverse = block.inverse + chunk.c,
                     *const mean = block.mean + chunk.c;
  const float cap = of.softcap * kLog2E;
  row_products<B>(keys, n, P, block.q + at, of.D, p);
  row_products<B>(values, n, P, block.g + at, of.D, ds);
  for (int64_t r = 0; r < n; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) {
      const int64_t i = r * kBlock + b * kLanes;
      Lanes score = load(p + i), slope = load(ds + i) - mean[b];
      if (cap > 0) {
        const Tanh bent = tanh_and_slope(score);
        score = cap * bent.value;
        slope *= bent.slope;
      }
      Lanes weight = exp2(score - top[b]) * inverse[b];
      if (chunk.partly) weight = where_seen(weight, Lanes{}, chunk.key + r, first + at + b * kLanes, of.window);
      store(p + i, weight);
      store(ds + i, weight * slope);
    }
  column_products<B>(keys, n, P, ds, block.dq + at);
  outer_products(ds, n, q_rows, rest, P, head.dkeys + chunk.key * P);
  outer_products(p, n, g_rows, rest, P, head.dvalues + chunk.key * P);
}

/// The part of queries [first, first + count) of one head: their dq, and their terms of dk and dv.
static void gradient_block(const AttentionGradient& job, int64_t b, int64_t h, int64_t first, int64_t count,
                           const KeyHeadGradient& head) {
  const Attention& of = job.of;
  const int64_t P = padded(of.D);
  float* next = head.block;
  const auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
  QueryGradient block{take(kBlock * P),
                      take(kBlock * P),
                      take(kBlock * P),
                      take(kBlock * P),
                      take(kBlock * P),
                      take(kKeys * kBlock),
                      take(kKeys * kBlock),
                      {},
                      {},
                      {}};
  const float *const queries = of.q.row(b, h, first), *const gradients = job.dout.row(b, h, first);
  transpose_in(queries, of.q.token, count, of.D, query_scale(of), block.q);
  transpose_in(gradients, job.dout.token, count, of.D, 1, block.g);
  pack(queries, of.q.token, count, of.D, of.scale, block.q_rows);
  pack(gradients, job.dout.token, count, of.D, 1, block.g_rows);
  __builtin_memset(block.dq, 0, static_cast<size_t>(kBlock * P) * sizeof(float));
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = (b * of.H + h) * of.T + first + n;
    block.top[n / kLanes][n % kLanes] = of.top[row];
    block.inverse[n / kLanes][n % kLanes] = of.inverse[row];
    block.mean[n / kLanes][n % kLanes] = dot(gradients + n * job.dout.token, of.out.row(b, h, first + n), of.D);
  }
  each_chunk(of, first, count, [&](const Chunk& chunk) {
    with_registers(chunk.B, [&]<int B>() { differentiate<B>(of, chunk, first, count, head, block); });
  });
  const Lanes scale[3] = {fill(of.scale), fill(of.scale), fill(of.scale)};
  transpose_out(block.dq, scale, count, of.D, job.dq.row(b, h, first), job.dq.token);
}

/// The gradient of key head k of batch row b and of all heads that read it.
static void gradient(const AttentionGradient& job, int64_t b, int64_t k, float* scratch) {
  const Attention& of = job.of;
  const int64_t P = padded(of.D), size = of.T * P, group = of.H / of.K;
  const KeyHeadGradient head{scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, scratch + 4 * size};
  pack(of.k.row(b, k, 0), of.k.token, of.T, of.D, 1, head.keys);
  pack(of.v.row(b, k, 0), of.v.token, of.T, of.D, 1, head.values);
  __builtin_memset(head.dkeys, 0, static_cast<size_t>(2 * size) * sizeof(float));
  for (int64_t h = k * group; h < (k + 1) * group; ++h)
    for (int64_t t = 0; t < of.T; t += kBlock)
      gradient_block(job, b, h, t, of.T - t < kBlock ? of.T - t : kBlock, head);
  unpack(head.dkeys, of.T, of.D, job.dk.row(b, k, 0), job.dk.token);
  unpack(head.dvalues, of.T, of.D, job.dv.row(b, k, 0), job.dv.token);
}
