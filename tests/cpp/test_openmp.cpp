// Loops on the threads of an OpenMP runtime that the process has loaded, and what a fork leaves of them.
#include "loops.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

static int64_t threads_alive() {
  namespace fs = std::filesystem;
  return std::distance(fs::directory_iterator("/proc/self/task"), fs::directory_iterator());
}

/// Whether loops hold in a forked child, on its own threads.
static bool holds_in_a_child() {
  const pid_t child = fork();
  if (child == 0) {
    CHECK(e2e::runtime() == e2e::Runtime::own);
    loops_hold();
    _exit(failures() ? 1 : 0);
  }
  int status = 1;
  return waitpid(child, &status, 0) == child && status == 0;
}

int main() {
  using e2e::Runtime;
  const bool loaded = dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
  const Runtime found = loaded ? Runtime::openmp : Runtime::own;
  CHECK(e2e::runtime() == found);
  loops_hold();
  CHECK(holds_in_a_child());

  const int64_t before = threads_alive();
  for (int i = 0; i < 10; ++i) e2e::parallel_for(16, 1, 3, [](int64_t, int64_t) {});
  CHECK(threads_alive() == before);
  e2e::force_own_threads(true);
  CHECK(e2e::runtime() == Runtime::own);
  loops_hold();
  if (loaded) CHECK(threads_alive() > before);  // the pool's
  CHECK(holds_in_a_child());
  e2e::force_own_threads(false);
  CHECK(e2e::runtime() == found);
  return failures();
}
#else
int main() {
  CHECK(e2e::runtime() == e2e::Runtime::own);
  return failures();
}
#endif
