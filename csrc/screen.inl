typedef int8_t ByteLanes __attribute__((vector_size(kLanes)));

static float dot_rows(const float* a, const float* b, int64_t n) { return dot(a, b, n); }

/// Rounds a row to int8: out = scale, ‖x‖², ‖x - scale · stored‖². Tiny rows are stored as zeros.
static void row_to_int8(const float* x, int64_t n, int8_t* stored, float* out) {
  Lanes peaks{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    peaks = greater(peaks, absolute(m == kLanes ? load(x + i) : load_part(x + i, m, 0)));
  }
  const float peak = largest(peaks);
  const float scale = peak / 127, inverse = peak > 0x1p-100f ? 127 / peak : 0;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer, rounded to nearest even
  Lanes square{}, error{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    const Lanes v = m == kLanes ? load(x + i) : load_part(x + i, m, 0);
    const Lanes level = (v * inverse + kRound) - kRound;
    const Lanes gap = v - level * scale;
    square += v * v;
    error += gap * gap;
    const ByteLanes bytes = __builtin_convertvector(__builtin_convertvector(level, IntLanes), ByteLanes);
    __builtin_memcpy(stored + i, &bytes, static_cast<size_t>(m));
  }
  out[0] = scale;
  out[1] = sum(square);
  out[2] = sum(error);
}

/// Rounds a row to bfloat16, to nearest even: out = 1, ‖x‖², ‖x - stored‖².
static void row_to_bfloat16(const float* x, int64_t n, uint16_t* stored, float* out) {
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
    __builtin_memcpy(stored + i, &s, static_cast<size_t>(m) * sizeof(uint16_t));
  }
  out[0] = 1;
  out[1] = sum(square);
  out[2] = sum(error);
}

/// The columns of a tile whose score may exceed each row's limit: found[r] of them at hits + 48 r.
static void screen_tile(const float* tile, int64_t height, const RowSide* rows, const ColumnSide& columns,
                        const float* limit, int32_t first, Candidate* hits, int32_t* found) {
  for (int64_t r = 0; r < height; ++r) {
    Candidate* const out = hits + r * kTileCols;
    int32_t count = 0;
    for (int64_t c = 0; c < kTileCols; c += kLanes) {
      const Lanes score =
          load(tile + r * kTileCols + c) * rows[r].scale * load(columns.scale + c) + load(columns.bias + c);
      const Lanes radius = rows[r].by_norm * load(columns.norm + c) +
                           (rows[r].by_error * load(columns.error + c) + load(columns.slack + c));
      const Lanes upper = score + radius, lower = score - radius;
      for (uint32_t bits = not_below(upper, limit[r]); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        out[count++] = {upper[lane], lower[lane], first + static_cast<int32_t>(c) + lane};
      }
    }
    found[r] = count;
  }
}

/// The columns of a panel whose score may exceed 0, row after row; returns how many. Writes up to kSpare beyond them.
static int64_t positive_hits(const PanelProduct& product, int64_t height, const TileSide* tiles,
                             const ColumnLimit& columns, int32_t* hits) {
  constexpr uint64_t kNone = uint64_t{1} << 63;  // beyond all columns; without it the compiler would branch
  int32_t* out = hits;
  for (int64_t first = 0; first < height; first += kTileRows) {
    const TileSide& rows = tiles[first / kTileRows];
    alignas(64) float base[kTileCols];
    for (int64_t c = 0; c < kTileCols; c += kLanes)
      store(base + c, -(rows.by_norm * load(columns.norm + c) + rows.by_error * load(columns.error + c)));
    uint64_t above[kTileRows];
    multiply_above(product.engine, product.rows + first * product.words, product.columns, product.words,
                   product.offset + first, base, columns.bias, rows.inverse, above);
    const int64_t end = first + kTileRows < height ? first + kTileRows : height;
    for (int64_t r = first; r < end; ++r) {
      const int32_t row = static_cast<int32_t>(r * kHitRow);
      // So many at once without looking whether they are there: a loop's end that comes as a surprise costs more.
      uint64_t bits = above[r - first];
      const int64_t count = __builtin_popcountll(bits);
      for (int64_t i = 0; i < count || i == 0; i += kSpare)
        for (int64_t k = 0; k < kSpare; ++k, bits &= bits - 1) out[i + k] = row + __builtin_ctzll(bits | kNone);
      out += count;
    }
  }
  return out - hits;
}

/// The score of each hit; where it exceeds its floor or is NaN it becomes the row's next in `lists` (`room` a row,
/// those beyond `limit` written over each other), and `active[row]` counts it. job's columns begin with feature
/// `first`.
static void score_hits(const Scoring& job, const int32_t* hits, int64_t count, int32_t first, Found* lists,
                       int64_t room, int32_t limit, int32_t* active) {
  const int64_t depth = job.depth;
  const auto each = [&](const auto& product) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t row = static_cast<uint32_t>(hits[i]) / kHitRow, column = static_cast<uint32_t>(hits[i]) % kHitRow;
      const float z = product(job.x + row * depth, job.weight + column * depth) + (job.bias ? job.bias[column] : 0);
      const int32_t place = active[row] < limit ? active[row] : limit;
      lists[row * room + place] = {z, first + static_cast<int32_t>(column)};
      active[row] += !(z <= (job.floor ? job.floor[column] : 0));
    }
  };
  by_width(
      depth,
      [&]<int R>() __attribute__((always_inline)) {
        each([](const float* a, const float* b) __attribute__((always_inline)) { return dot<R>(a, b); });
      },
      [&]() __attribute__((always_inline)) {
        each([&](const float* a, const float* b) __attribute__((always_inline)) { return dot(a, b, depth); });
      });
}
