#pragma once
#include <sys/types.h>

#include <cstddef>
#include <string>

namespace ragturbo {

// Zeroed memory, aligned to 2 MiB, on huge pages if the system has them, and page-locked through the CUDA driver if there
// is one. The driver (libcuda.so.1) is loaded at run time, so that one build runs with and without a GPU. The address
// never changes.
class Arena {
 public:
  // Throws std::invalid_argument for 0 bytes and std::bad_alloc without memory. A missing GPU is not an error.
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }
  // Address for kernels; null if the memory is not page-locked.
  void* device_data() const { return device_data_; }
  bool page_locked() const { return device_data_ != nullptr; }
  // Why it is not page-locked; empty if it is.
  const std::string& reason() const { return reason_; }

 private:
  void lock();

  void* data_ = nullptr;
  void* device_data_ = nullptr;
  size_t size_;
  size_t mapped_;
  int device_ = 0;
  pid_t owner_;
  std::string reason_;
};

}  // namespace ragturbo
