#include "threads.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

#include "pool.hpp"

namespace ragturbo {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Looked up in what the process has loaded: linking an OpenMP library would add a second set of threads.
Parallel openmp() {
  // Kept only if found: torch may be loaded later.
  static std::atomic<Parallel> found{nullptr};
  if (!found.load(std::memory_order_relaxed)) found = reinterpret_cast<Parallel>(::dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found.load(std::memory_order_relaxed);
}

struct Tasks {
  const std::function<void(size_t)>& body;
  size_t count;
  std::atomic<size_t> next{0};
};

void work(void* data) {
  auto& tasks = *static_cast<Tasks*>(data);
  for (size_t i; (i = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;) tasks.body(i);
}

}  // namespace

void run_on_torch_threads(size_t count, int threads, const std::function<void(size_t)>& body) {
  threads = static_cast<int>(std::min<size_t>(count, static_cast<size_t>(std::max(threads, 1))));
  Tasks tasks{body, count};
  if (threads <= 1) return work(&tasks);
  const Parallel parallel = openmp();
  if (!parallel) return run_parallel(count, threads, body);
  parallel(&work, &tasks, static_cast<unsigned>(threads), 0);
}

const char* torch_threads() { return openmp() ? "openmp" : "pool"; }

}  // namespace ragturbo
