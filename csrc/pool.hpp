#pragma once
#include <cstddef>
#include <functional>

namespace ragturbo {

constexpr int kMaxThreads = 64;

// Calls body(0) … body(tasks - 1) on up to `threads` threads including the caller's, and returns when all are done.
// The other threads belong to one pool per process and start when first needed; a forked child starts its own. `body`
// must not throw. Thread-safe.
void run_parallel(size_t tasks, int threads, const std::function<void(size_t)>& body);

}  // namespace ragturbo
