#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace ragturbo {

// Elements below which waking a thread takes longer than the work.
constexpr int64_t kSerial = 32768;

// Calls body(0) … body(tasks - 1) on up to `threads` threads including the caller's, for work between torch's own
// operations. Torch's OpenMP threads keep their processors busy for milliseconds after each of its operations, so other
// threads would wait for them: if torch has loaded GNU's OpenMP, or a runtime with its interface, these threads are
// used, and else those of pool.hpp. `body` must not throw. Thread-safe.
void run_on_torch_threads(size_t tasks, int threads, const std::function<void(size_t)>& body);

// "openmp" or "pool".
const char* torch_threads();

}  // namespace ragturbo
