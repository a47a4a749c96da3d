#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace e2e {
namespace {

/// One parallel loop. Every thread has a share of consecutive pieces, the same in every loop of one length, so that
/// what it wrote in one loop is in its core's cache in the next; who is done takes pieces from the others' shares.
class Loop {
 public:
  Loop(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body)
      : grain_(grain), threads_(threads), body_(body), shares_(new Share[threads]) {
    const int64_t pieces = (count + grain - 1) / grain;
    for (int t = 0; t < threads; ++t) {
      shares_[t].next = t * pieces / threads * grain;
      shares_[t].end = std::min(count, (t + 1) * pieces / threads * grain);
    }
  }

  /// What thread `number` of the loop does.
  void work(int number) {
    for (int i = 0; i < threads_; ++i) take_all(shares_[(number + i) % threads_]);
  }

  std::exception_ptr error() const { return error_; }

 private:
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };

  void take_all(Share& share) {
    for (;;) {
      const int64_t begin = share.next.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= share.end) return;
      try {
        body_(begin, std::min(share.end, begin + grain_));
      } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        for (int t = 0; t < threads_; ++t) shares_[t].next.store(shares_[t].end, std::memory_order_relaxed);
      }
    }
  }

  const int64_t grain_;
  const int threads_;
  const std::function<void(int64_t, int64_t)>& body_;
  const std::unique_ptr<Share[]> shares_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

/// Set on the pool's workers, and on a caller while its loop runs: a loop inside a loop stays on its thread.
thread_local bool inside = false;

std::atomic<bool> forked{false};  // in a child of the process that loaded this library: its OpenMP threads are gone
std::atomic<bool> own_forced{false};

// ---- the threads that torch uses ----

/// GNU's entry to a parallel region, which Intel's and LLVM's runtimes have too: region(data) on every thread of a
/// team.
using ParallelRegion = void (*)(void (*region)(void*), void* data, unsigned threads, unsigned flags);

struct OpenMP {
  ParallelRegion parallel = nullptr;
  int (*thread_number)() = nullptr;

  /// Looks both up in a scope; whether they are there.
  bool find(void* scope) {
    parallel = reinterpret_cast<ParallelRegion>(dlsym(scope, "GOMP_parallel"));
    thread_number = reinterpret_cast<int (*)()>(dlsym(scope, "omp_get_thread_num"));
    return parallel && thread_number;
  }
};

/// The runtime that torch itself would reach: the global scope comes first, then what libtorch depends on (Python loads
/// it privately).
OpenMP find_openmp() {
  OpenMP runtime;
#if defined(__linux__)
  if (runtime.find(RTLD_DEFAULT)) return runtime;
  std::string torch;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* name) {
        if (!std::strstr(library->dlpi_name, "libtorch_cpu")) return 0;
        *static_cast<std::string*>(name) = library->dlpi_name;
        return 1;
      },
      &torch);
  void* const handle = torch.empty() ? nullptr : dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle && runtime.find(handle)) return runtime;  // the handle is kept: Python never unloads torch
#endif
  return {};
}

/// Looked up at the first loop; null where there is none, or where it must not be used.
const OpenMP* openmp() {
  static const OpenMP found = find_openmp();
  return forked || own_forced || !found.parallel ? nullptr : &found;
}

struct Region {
  Loop& loop;
  const OpenMP& runtime;

  static void run(void* data) {
    const auto& region = *static_cast<Region*>(data);
    inside = true;
    region.loop.work(region.runtime.thread_number());
    inside = false;
  }
};

// ---- threads of our own ----

/// Lives until the process ends: its workers wait, and joining them at exit would only invite deadlocks.
class Pool {
 public:
  void run(Loop& loop, int helpers) {
    {
      const std::lock_guard lock(mutex_);
      try {
        for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        // No more threads to be had: those that exist, or the caller alone, do the work.
      }
      loop_ = &loop;
      wanted_ = std::min(helpers, workers_);
    }
    wake_.notify_all();
    loop.work(0);
    std::unique_lock lock(mutex_);
    wanted_ = 0;  // whoever has not started yet finds nothing left to do
    done_.wait(lock, [this] { return active_ == 0; });
    loop_ = nullptr;
  }

 private:
  void serve() {
    inside = true;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      const int number = wanted_--;
      ++active_;
      Loop* const loop = loop_;
      lock.unlock();
      loop->work(number);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int workers_ = 0, wanted_ = 0, active_ = 0;
};

Pool* pool = nullptr;
std::mutex pool_mutex;

#if defined(__unix__) || defined(__APPLE__)
/// A forked child inherits no thread but its caller: it forgets the parent's pool, and OpenMP, which would wait for its
/// own.
[[maybe_unused]] const int registered =
    pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                   [] {
                     pool = nullptr;  // leaked on purpose: its mutexes are in an unknown state
                     forked = true;
                     pool_mutex.unlock();
                   });
#endif

/// Made at the first call.
Pool& the_pool() {
  if (!pool) pool = new Pool;
  return *pool;
}

}  // namespace

Runtime runtime() { return openmp() ? Runtime::openmp : Runtime::own; }

void force_own_threads(bool own) { own_forced = own; }

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int workers =
      inside ? 1 : static_cast<int>(std::clamp<int64_t>((count + grain - 1) / grain, 1, std::max(threads, 1)));
  Loop loop(count, grain, workers, body);
  if (workers == 1) {
    loop.work(0);
  } else if (const OpenMP* const runtime = openmp()) {
    // The whole team even where the pieces are fewer: libgomp ends the threads that a smaller team leaves out.
    Region region{loop, *runtime};
    runtime->parallel(Region::run, &region, static_cast<unsigned>(threads), 0);
  } else {
    const std::lock_guard lock(pool_mutex);
    inside = true;
    the_pool().run(loop, workers - 1);
    inside = false;
  }
  if (loop.error()) std::rethrow_exception(loop.error());
}

}  // namespace e2e
