#pragma once
#include <cstddef>
#include <functional>

namespace ragturbo {

constexpr int kMaxThreads = 64;

// body(0) … body(tasks - 1) on up to `threads` threads, the caller's among them; returns when all are done.
// The other threads live in one pool for the process and are started as they are first needed; a forked child starts
// its own. `body` must not throw. Safe to call from many threads at once.
void run_parallel(size_t tasks, int threads, const std::function<void(size_t)>& body);

}  // namespace ragturbo
