#include "sparse.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "simd.hpp"
#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace e2e {

/// A score that passed the threshold, or bounds on one.
struct Hit {
  float upper, lower;
  int32_t index;
};

/// What one row of x contributes to the bound (see Rounding): `a` times ‖w‖, `b` times ‖w - wb‖.
struct RowBound {
  float a, b;
};

}  // namespace e2e

#define E2E_KERNELS "sparse.inl"
#include "for_each_simd.hpp"

namespace e2e {
namespace {

constexpr int64_t kSegment = 512;  // columns scanned before the threshold is looked at again

/// A float as an integer of the same order, NaN above everything.
int32_t order(float value) {
  if (std::isnan(value)) return INT32_MAX;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits)) : bits;
}

void check_index(int64_t index, int64_t features) {
  if (index < 0 || index >= features)
    throw std::invalid_argument("code.indices must lie in [0, " + std::to_string(features) + "), got " +
                                std::to_string(index));
}

/// Rows a thread takes at once: enough to be worth it, few enough to share well.
int64_t grain(int64_t rows, int threads) { return std::max<int64_t>(1, rows / (8 * std::max(1, threads))); }

}  // namespace

void to_bfloat16(const float* x, int64_t rows, int64_t columns, uint16_t* rounded, float* norm, float* error_norm,
                 int threads) {
  // A float32 sum of D squares in 64 strands is short by less than (D / 64 + 8) 2^-24 of itself.
  const float up = 1 + static_cast<float>(columns / 64 + 8) * 0x1p-23f;
  parallel_for(rows, grain(rows, threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float squares[2];
      E2E_DISPATCH(round_row, x + r * columns, columns, rounded + r * columns, squares);
      norm[r] = up * std::sqrt(squares[0]);
      error_norm[r] = up * std::sqrt(squares[1]);
    }
  });
}

Selection::Selection(int64_t rows, int64_t k, int64_t limit) : k_(k), limit_(limit), rows_(rows) {}

template <class Scan>
void Selection::add_segments(int64_t columns, bool exact, int threads, const Scan& scan) {
  const int64_t count = static_cast<int64_t>(rows_.size());
  parallel_for(count, grain(count, threads), threads, [&](int64_t begin, int64_t end) {
    std::vector<Hit> hits(kSegment);
    std::vector<int32_t> scratch;
    for (int64_t r = begin; r < end; ++r) {
      Row& row = rows_[r];
      for (int64_t c = 0; c < columns; c += kSegment) {
        int64_t found = scan(r, c, std::min(columns - c, kSegment), row.threshold, hits.data());
        if (exact) {
          row.active += found;
          if (limit_ >= 0) found = std::min(found, std::max<int64_t>(0, limit_ - static_cast<int64_t>(row.kept.size())));
        }
        for (int64_t i = 0; i < found; ++i)
          row.kept.push_back({hits[i].upper, hits[i].lower, exact ? hits[i].index : ~hits[i].index});
        if (k_ && static_cast<int64_t>(row.kept.size()) > 3 * k_ + 32) compact(row, scratch);
      }
    }
  });
}

void Selection::add(const float* scores, int64_t columns, int64_t first, int threads) {
  add_segments(columns, true, threads, [&](int64_t r, int64_t c, int64_t n, float limit, Hit* hits) {
    return E2E_DISPATCH(scan_scores, scores + r * columns + c, n, limit, static_cast<int32_t>(first + c), hits);
  });
}

void Selection::add_screened(const uint16_t* scores, int64_t columns, int64_t first, const float* bias, Rounding x,
                             Rounding weight, int64_t depth, int threads) {
  // Two float32 accumulations of `depth` terms, in any order, each off by at most depth · 2^-24 ‖x‖ ‖w‖.
  const float accumulation = static_cast<float>(depth + 8) * 0x1p-22f;
  add_segments(columns, false, threads, [&](int64_t r, int64_t c, int64_t n, float limit, Hit* hits) {
    const float rounded_norm = x.norm[r] + x.error_norm[r];
    const RowBound bound{1.0001f * (x.error_norm[r] + accumulation * rounded_norm), 1.0001f * rounded_norm};
    return E2E_DISPATCH(scan_screened, scores + r * columns + c, n, bias ? bias + c : nullptr, bound, weight.norm + c,
                        weight.error_norm + c, limit, static_cast<int32_t>(first + c), hits);
  });
}

/// Raises the threshold to the k-th greatest lower bound and drops what cannot win any more.
void Selection::compact(Row& row, std::vector<int32_t>& scratch) const {
  const bool exact = std::all_of(row.kept.begin(), row.kept.end(), [](const Entry& e) { return e.index >= 0; });
  if (exact) {
    keep_best(row.kept);
    const auto worst = std::min_element(row.kept.begin(), row.kept.end(), [](const Entry& a, const Entry& b) {
      return order(a.lower) < order(b.lower);
    });
    row.threshold = worst->lower;
    return;
  }
  scratch.clear();
  for (const Entry& e : row.kept) scratch.push_back(order(e.lower));
  std::nth_element(scratch.begin(), scratch.begin() + (k_ - 1), scratch.end(), std::greater<>());
  const int32_t bound = scratch[k_ - 1];
  for (const Entry& e : row.kept)
    if (order(e.lower) == bound) row.threshold = std::max(row.threshold, e.lower);
  std::erase_if(row.kept, [&](const Entry& e) { return order(e.upper) < bound; });
}

/// Leaves the k best exact entries, in no order.
void Selection::keep_best(std::vector<Entry>& kept) const {
  if (static_cast<int64_t>(kept.size()) <= k_) return;
  std::nth_element(kept.begin(), kept.begin() + (k_ - 1), kept.end(), better);
  kept.resize(k_);
}

bool Selection::better(const Entry& a, const Entry& b) {
  const int32_t x = order(a.upper), y = order(b.upper);
  return x != y ? x > y : a.index < b.index;
}

void Selection::rescore(const float* x, const float* weight, const float* bias, int64_t depth, int threads) {
  const int64_t count = static_cast<int64_t>(rows_.size());
  parallel_for(count, grain(count, threads), threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> scratch;
    for (int64_t r = begin; r < end; ++r) {
      Row& row = rows_[r];
      if (k_ && static_cast<int64_t>(row.kept.size()) > k_) compact(row, scratch);
      for (size_t i = 0; i < row.kept.size(); ++i) {
        Entry& e = row.kept[i];
        if (e.index >= 0) continue;
        e.index = ~e.index;
        if (i + 1 < row.kept.size()) {
          const int64_t next = std::max(row.kept[i + 1].index, ~row.kept[i + 1].index);
          for (int64_t at = 0; at < std::min<int64_t>(depth, 256); at += 16) __builtin_prefetch(weight + next * depth + at);
        }
        const float z = E2E_DISPATCH(dot_rows, x + r * depth, weight + e.index * depth, depth) + (bias ? bias[e.index] : 0);
        e.upper = e.lower = z;
        if (!(z <= 0)) ++row.active;
      }
      std::erase_if(row.kept, [](const Entry& e) { return e.upper <= 0; });
    }
  });
}

int64_t Selection::kept() const {
  return std::accumulate(rows_.begin(), rows_.end(), int64_t{0},
                         [](int64_t sum, const Row& row) { return sum + static_cast<int64_t>(row.kept.size()); });
}

int64_t Selection::fullest() const {
  int64_t most = 0;
  for (const Row& row : rows_) most = std::max(most, row.active);
  return most;
}

void Selection::finish(float* values, int32_t* indices, int32_t* count, int64_t slots, int threads) {
  const int64_t rows = static_cast<int64_t>(rows_.size());
  parallel_for(rows, grain(rows, threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Row& row = rows_[r];
      if (k_) {
        keep_best(row.kept);
        std::sort(row.kept.begin(), row.kept.end(), better);
      }
      const int64_t used = std::min<int64_t>(slots, static_cast<int64_t>(row.kept.size()));
      for (int64_t i = 0; i < used; ++i) {
        values[r * slots + i] = row.kept[i].upper;
        indices[r * slots + i] = row.kept[i].index;
      }
      std::fill(values + r * slots + used, values + (r + 1) * slots, 0.f);
      std::fill(indices + r * slots + used, indices + (r + 1) * slots, 0);
      count[r] = static_cast<int32_t>(k_ ? used : row.active);
    }
  });
}

void decode(const float* values, const int32_t* indices, int64_t rows, int64_t slots, const float* weight,
            int64_t features, int64_t width, bool normalize, const float* bias, Slots which, float* y, int threads) {
  const bool keep_negative = which == Slots::nonzero;
  std::vector<float> scales(normalize ? features : 0, -1.f);
  std::vector<int32_t> used;
  for (int64_t i = 0; i < rows * slots; ++i) {
    const int32_t j = indices[i];
    check_index(j, features);
    if (normalize && scales[j] < 0) {
      scales[j] = 0;
      used.push_back(j);
    }
  }
  const int64_t count = static_cast<int64_t>(used.size());
  parallel_for(count, grain(count, threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      scales[used[i]] = E2E_DISPATCH(row_scale, weight + used[i] * width, width);
  });
  const float* const scale = normalize ? scales.data() : nullptr;
  parallel_for(rows, grain(rows, threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      E2E_DISPATCH(decode_row, values + n * slots, indices + n * slots, slots, weight, width, scale, bias, keep_negative,
                   y + n * width);
  });
}

void code_backward(const Backward& job, int threads) {
  const int64_t size = job.rows * job.slots;
  // The transposed code: positions of each feature's used slots, ascending (a counting sort).
  std::vector<int64_t> start(job.features + 1, 0), slots;
  for (int64_t i = 0; i < size; ++i) {
    check_index(job.indices[i], job.features);
    if (!(job.values[i] <= 0)) ++start[job.indices[i] + 1];
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  slots.resize(start.back());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < size; ++i) {
    if (job.values[i] <= 0)
      job.dvalues[i] = 0;
    else
      slots[next[job.indices[i]]++] = i;
  }
  parallel_for(job.features, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      E2E_DISPATCH(backward_feature, job, j, slots.data() + start[j], start[j + 1] - start[j]);
  });
}

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void keep_freed_memory(int64_t bytes) {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, static_cast<int>(bytes / 4));
  mallopt(M_TRIM_THRESHOLD, static_cast<int>(bytes));
#else
  (void)bytes;
#endif
}

}  // namespace e2e
