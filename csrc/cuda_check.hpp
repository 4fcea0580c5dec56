#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ragturbo {

inline void check_cuda(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // not left behind for the next caller's check
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// `value` must be at least `least`; `text` says which argument it is.
inline void at_least(int64_t value, int64_t least, const char* text) {
  if (value < least)
    throw std::invalid_argument(std::string(text) + "=" + std::to_string(value) + " must be at least " +
                                std::to_string(least));
}

inline void aligned(const void* pointer, uintptr_t bytes, const char* text) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address == 0 || address % bytes)
    throw std::invalid_argument(std::string(text) + "=" + std::to_string(address) +
                                " must be a device address, a multiple of " + std::to_string(bytes));
}

}  // namespace ragturbo
