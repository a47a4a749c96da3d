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

/// One parallel loop: pieces are handed out by an atomic counter.
struct Loop {
  int64_t count, grain;
  const std::function<void(int64_t, int64_t)>& body;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      try {
        body(begin, std::min(count, begin + grain));
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
  }
};

/// Set on the pool's workers, and on a caller while its loop runs: a loop inside a loop stays on its thread.
thread_local bool inside = false;

std::atomic<bool> forked{false};     // in a child of the process that loaded this library: its OpenMP threads are gone
std::atomic<bool> own_forced{false};

// ---- the threads that torch uses --------------------------------------------------------------------------------------

/// GNU's entry to a parallel region, which Intel's and LLVM's runtimes have too: region(data) on every thread of a team.
using ParallelRegion = void (*)(void (*region)(void*), void* data, unsigned threads, unsigned flags);

/// The runtime that torch itself would reach: the global scope comes first, then what libtorch depends on (Python loads
/// it privately).
ParallelRegion find_openmp() {
#if defined(__linux__)
  constexpr const char* kName = "GOMP_parallel";
  void* symbol = dlsym(RTLD_DEFAULT, kName);
  if (symbol) return reinterpret_cast<ParallelRegion>(symbol);
  std::string torch;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* name) {
        if (!std::strstr(library->dlpi_name, "libtorch_cpu")) return 0;
        *static_cast<std::string*>(name) = library->dlpi_name;
        return 1;
      },
      &torch);
  void* const handle = torch.empty() ? nullptr : dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle) symbol = dlsym(handle, kName);  // the handle is kept: Python never unloads torch
  return reinterpret_cast<ParallelRegion>(symbol);
#else
  return nullptr;
#endif
}

/// Looked up at the first loop.
ParallelRegion openmp() {
  static const ParallelRegion found = find_openmp();
  return forked || own_forced ? nullptr : found;
}

void run_region(void* loop) {
  inside = true;
  static_cast<Loop*>(loop)->work();
  inside = false;
}

// ---- threads of our own -------------------------------------------------------------------------------------------------

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
    loop.work();
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
      --wanted_;
      ++active_;
      Loop* const loop = loop_;
      lock.unlock();
      loop->work();
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
/// A forked child inherits no thread but its caller: it forgets the parent's pool, and OpenMP, which would wait for its own.
[[maybe_unused]] const int registered = pthread_atfork(
    [] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
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
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  Loop loop{.count = count, .grain = grain, .body = body};
  if (helpers <= 0 || inside) {
    loop.work();
  } else if (const ParallelRegion region = openmp()) {
    // The whole team even where the pieces are fewer: libgomp ends the threads that a smaller team leaves out.
    region(run_region, &loop, static_cast<unsigned>(threads), 0);
  } else {
    const std::lock_guard lock(pool_mutex);
    inside = true;
    the_pool().run(loop, helpers);
    inside = false;
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace e2e
