// A block of tokens stands in lanes, three registers wide and transposed ([channel][token]); rows of another matrix are
// broadcast, so that no sum crosses lanes. Needs lanes.inl.

#if E2E_SIMD == 2 || defined(__aarch64__)
constexpr int64_t kRows = 8;  // broadcast by a tile: times B ≤ 3 registers they fill a register file of 32
#else
constexpr int64_t kRows = 4;  // of 16
#endif
constexpr int64_t kBlock = 3 * kLanes;  // tokens

/// D rounded up to whole registers.
static int64_t padded(int64_t D) { return (D + kLanes - 1) / kLanes * kLanes; }

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

/// columns [d][kBlock] = scale · rows[token, d] of `count` tokens; the lanes beyond and rows [D, padded(D)) hold zeros.
static void transpose_in(const float* rows, int64_t stride, int64_t count, int64_t D, float scale, float* columns) {
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t d = 0; d < D; d += kLanes) {
      Lanes m[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* const row = rows + (b * kLanes + i) * stride + d;
        m[i] = b * kLanes + i >= count ? Lanes{} : d + kLanes <= D ? load(row) : load_part(row, D - d, 0);
      }
      transpose(m);
      for (int64_t i = 0; i < kLanes; ++i) store(columns + (d + i) * kBlock + b * kLanes, m[i] * scale);
    }
}

/// rows[token, d] = columns [d][kBlock] · factor[token] of `count` tokens.
static void transpose_out(const float* columns, const Lanes (&factor)[3], int64_t count, int64_t D, float* rows,
                          int64_t stride) {
  for (int64_t b = 0; b * kLanes < count; ++b)
    for (int64_t d = 0; d < D; d += kLanes) {
      Lanes m[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) m[i] = load(columns + (d + i) * kBlock + b * kLanes) * factor[b];
      transpose(m);
      for (int64_t i = 0; i < kLanes && b * kLanes + i < count; ++i) {
        float* const row = rows + (b * kLanes + i) * stride + d;
        if (d + kLanes <= D) store(row, m[i]);
        else store_part(row, m[i], D - d);
      }
    }
}

/// out [r, b] = start[r] + Σ_d rows[r, d] columns[d, b] for R rows and B registers of columns. Entries of rows are
/// `row` and `column` apart, columns and out kBlock; start may be null.
template <int R, int B>
E2E_INLINE void row_tile(const float* rows, int64_t row, int64_t column, const float* columns, int64_t D,
                         const float* start, float* out) {
  Lanes sum[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) sum[r][b] = start ? fill(start[r]) : Lanes{};
  for (int64_t d = 0; d < D; ++d) {
    Lanes x[B];
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) x[b] = load(columns + d * kBlock + b * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes c = fill(rows[r * row + d * column]);
#pragma GCC unroll 3
      for (int b = 0; b < B; ++b) sum[r][b] += c * x[b];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int b = 0; b < B; ++b) store(out + r * kBlock + b * kLanes, sum[r][b]);
}
