#include "sparse.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

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

/// A used slot of a code: value = values[token, place].
struct Slot {
  int32_t token, place;
  float value;
};

}  // namespace e2e

#define E2E_KERNELS "sparse.inl"
#include "for_each_simd.hpp"

namespace e2e {
namespace {

constexpr int64_t kCached = int64_t{8} << 20;  // floats that may stay in a cache
constexpr int64_t kFeaturesAtOnce = 64;        // that a thread takes
constexpr int64_t kScannedRows = 64;           // rows whose scores a job scans
constexpr int64_t kSegment = 512;              // columns scanned before the threshold is looked at again

void check_index(int64_t index, int64_t features) {
  if (index < 0 || index >= features)
    throw std::invalid_argument("code.indices must lie in [0, " + std::to_string(features) + "), got " +
                                std::to_string(index));
}

/// Rows a thread takes at once: enough to be worth it, few enough to share well.
int64_t grain(int64_t rows, int threads) { return std::max<int64_t>(1, rows / (8 * std::max(1, threads))); }

}  // namespace

void Selection::add(const float* scores, int64_t columns, int64_t first, int threads) {
  parallel_for(rows(), grain(rows(), threads), threads, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> found(kSegment);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < columns; c += kSegment) {
        const int64_t count = E2E_DISPATCH(scan_scores, scores + r * columns + c, std::min(columns - c, kSegment),
                                           rows_[r].threshold, static_cast<int32_t>(first + c), found.data());
        append(rows_[r], found.data(), count);
      }
  });
}

void Selection::append(Row& row, const Candidate* found, int64_t count) const {
  row.kept.insert(row.kept.end(), found, found + count);
  for (int64_t i = 0; i < count; ++i)
    if (const int32_t key = order(found[i].lower); key > row.bound) row.best.push_back(key);
  if (static_cast<int64_t>(row.best.size()) > 2 * k_ + 64) raise_bound(row);
  if (static_cast<int64_t>(row.kept.size()) > std::max(row.room, 8 * k_ + 64)) drop_losers(row);
}

/// Candidates come in ascending order of their features, so a later one must exceed the k-th greatest lower bound: of
/// equal scores the earlier wins.
void Selection::raise_bound(Row& row) const {
  if (static_cast<int64_t>(row.best.size()) < k_) return;
  std::nth_element(row.best.begin(), row.best.begin() + (k_ - 1), row.best.end(), std::greater<>());
  row.best.resize(k_);
  row.bound = row.best.back();
  if (row.bound > 0 && row.bound != INT32_MAX)
    std::memcpy(&row.threshold, &row.bound, sizeof row.bound);  // a positive number is its own key
}

void Selection::drop_losers(Row& row) const {
  std::erase_if(row.kept, [&](const Candidate& c) { return order(c.upper) < row.bound; });
  row.room = 3 * static_cast<int64_t>(row.kept.size());
}

/// Leaves the k best exact candidates, in no order.
void Selection::keep_best(std::vector<Candidate>& kept) const {
  if (static_cast<int64_t>(kept.size()) <= k_) return;
  std::nth_element(kept.begin(), kept.begin() + (k_ - 1), kept.end(), better);
  kept.resize(k_);
}

int32_t Selection::order(float value) {
  if (std::isnan(value)) return INT32_MAX;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits)) : bits;
}

bool Selection::better(const Candidate& a, const Candidate& b) {
  const int32_t x = order(a.upper), y = order(b.upper);
  return x != y ? x > y : a.index < b.index;
}

void Selection::finish(float* values, int32_t* indices, int32_t* count, int64_t slots, int threads) {
  parallel_for(rows(), grain(rows(), threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Row& row = rows_[r];
      raise_bound(row);
      drop_losers(row);
      keep_best(row.kept);
      std::sort(row.kept.begin(), row.kept.end(), better);
      const int64_t used = std::min<int64_t>(slots, static_cast<int64_t>(row.kept.size()));
      for (int64_t i = 0; i < used; ++i) {
        values[r * slots + i] = row.kept[i].upper;
        indices[r * slots + i] = row.kept[i].index;
      }
      std::fill(values + r * slots + used, values + (r + 1) * slots, 0.f);
      std::fill(indices + r * slots + used, indices + (r + 1) * slots, 0);
      count[r] = static_cast<int32_t>(used);
    }
  });
}

Positives::Positives(int64_t rows, int64_t limit)
    : limit_(limit < 0 ? std::numeric_limits<int64_t>::max() : limit), active_(rows) {}

/// Appends blocks of `block` rows that cover [begin, end).
void Positives::divide(int64_t begin, int64_t end, int64_t block) {
  for (int64_t first = begin; first < end; first += block)
    blocks_.push_back({first, std::min(block, end - first), {}, {}});
}

void Positives::add(const float* scores, int64_t columns, int64_t first, int threads) {
  if (blocks_.empty()) divide(0, rows(), kScannedRows);
  parallel_jobs(static_cast<int64_t>(blocks_.size()), threads, [&](int64_t job, int) {
    Block& block = blocks_[job];
    std::vector<Candidate> hits(kSegment);
    for (int64_t row = block.first; row < block.first + block.rows; ++row) {
      const size_t before = block.found.size();
      for (int64_t c = 0; c < columns; c += kSegment) {
        const int64_t count = E2E_DISPATCH(scan_scores, scores + row * columns + c, std::min(columns - c, kSegment),
                                           0.f, static_cast<int32_t>(first + c), hits.data());
        const int64_t stored = std::clamp<int64_t>(limit_ - active_[row], 0, count);
        for (int64_t i = 0; i < stored; ++i) block.found.push_back({hits[i].upper, hits[i].index});
        active_[row] += static_cast<int32_t>(count);
      }
      block.lengths.push_back(static_cast<int32_t>(block.found.size() - before));
    }
  });
}

int64_t Positives::fullest() const { return active_.empty() ? 0 : *std::max_element(active_.begin(), active_.end()); }

void Positives::finish(float* values, int32_t* indices, int32_t* count, int64_t slots, int threads) const {
  std::copy(active_.begin(), active_.end(), count);
  const auto fill = [&](const Block& block) {
    std::vector<int64_t> filled(block.rows);
    const Found* next = block.found.data();
    for (size_t i = 0; i < block.lengths.size(); ++i) {
      const int64_t r = static_cast<int64_t>(i) % block.rows, to = (block.first + r) * slots + filled[r];
      const int64_t room = std::min<int64_t>(block.lengths[i], slots - filled[r]);
      for (int64_t k = 0; k < room; ++k) values[to + k] = next[k].value, indices[to + k] = next[k].index;
      filled[r] += room;
      next += block.lengths[i];
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = (block.first + r) * slots;
      std::fill(values + row + filled[r], values + row + slots, 0.f);
      std::fill(indices + row + filled[r], indices + row + slots, 0);
    }
  };
  if (blocks_.empty()) {  // nothing was added
    std::fill_n(values, rows() * slots, 0.f);
    std::fill_n(indices, rows() * slots, 0);
  }
  parallel_jobs(static_cast<int64_t>(blocks_.size()), threads, [&](int64_t job, int) { fill(blocks_[job]); });
}

void decode(const float* values, const int32_t* indices, int64_t rows, int64_t slots, const float* weight,
            int64_t features, int64_t width, bool normalize, const float* bias, Slots which, float* y, int threads) {
  const bool keep_negative = which == Slots::nonzero;
  std::vector<float> scales(normalize ? features : 0);
  parallel_for(rows, grain(rows, threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * slots; i < end * slots; ++i) check_index(indices[i], features);
    E2E_DISPATCH(decode_rows, values + begin * slots, indices + begin * slots, end - begin, slots, weight, width,
                 normalize ? scales.data() : nullptr, bias, keep_negative, y + begin * width);
  });
}

namespace {

/// The transposed code: each feature's used slots, tokens ascending.
struct Transposed {
  std::vector<int64_t> start;     // (F + 1)
  std::unique_ptr<Slot[]> slots;  // never filled with zeros: that would bring them all to one core
};

/// A counting sort. Each chunk of tokens counts its slots and later puts them where its share of each feature begins,
/// so the order is the same for any number of chunks. Puts 0 into the unused slots of dvalues.
Transposed transpose(const Backward& job, int threads) {
  const int64_t F = job.features;
  // A count for every feature and chunk: no more of them than slots.
  const int64_t chunks = std::clamp<int64_t>(job.rows * job.slots / std::max<int64_t>(F, 1), 1, std::max(threads, 1));
  const auto rows_of = [&](int64_t chunk) {
    return std::pair(chunk * job.rows / chunks, (chunk + 1) * job.rows / chunks);
  };
  std::vector<int64_t> next(chunks * F);
  parallel_jobs(chunks, threads, [&](int64_t chunk, int) {
    const auto [first, last] = rows_of(chunk);
    int64_t* const count = next.data() + chunk * F;
    for (int64_t i = first * job.slots; i < last * job.slots; ++i) {
      check_index(job.indices[i], F);
      count[job.indices[i]] += !(job.values[i] <= 0);
    }
  });
  Transposed code{std::vector<int64_t>(F + 1), {}};
  int64_t total = 0;
  for (int64_t j = 0; j < F; ++j) {
    code.start[j] = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += std::exchange(next[chunk * F + j], total);
  }
  code.start[F] = total;
  code.slots.reset(new Slot[total]);
  parallel_jobs(chunks, threads, [&](int64_t chunk, int) {
    const auto [first, last] = rows_of(chunk);
    int64_t* const to = next.data() + chunk * F;
    for (int64_t n = first; n < last; ++n)
      for (int64_t k = 0; k < job.slots; ++k) {
        const int64_t i = n * job.slots + k;
        if (!(job.values[i] <= 0))
          code.slots[to[job.indices[i]]++] = {static_cast<int32_t>(n), static_cast<int32_t>(k), job.values[i]};
        else if (job.dvalues) job.dvalues[i] = 0;
      }
  });
  return code;
}

}  // namespace

void code_backward(const Backward& job, int threads) {
  const Transposed code = transpose(job, threads);
  // Gradients larger than the caches are not read before they are complete: writing past the caches saves fetching
  // them.
  const auto aligned = [&](const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; };
  const bool past_caches =
      job.features * job.width >= kCached && job.width % 16 == 0 && aligned(job.dW_dec) && aligned(job.dW_enc);
  parallel_for(job.features, kFeaturesAtOnce, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * job.width);
    E2E_DISPATCH(backward_features, job, begin, end, code.slots.get(), code.start.data(), past_caches, scratch.data());
    E2E_DISPATCH(finish_streaming);
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
