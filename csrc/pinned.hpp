#pragma once
#include <sys/types.h>

#include <cstddef>
#include <string>

namespace ragturbo {

// Zeroed memory, aligned to 2 MiB and on huge pages where the system gives them; page-locked through the CUDA driver
// where there is one. The driver is loaded at run time (libcuda.so.1), so that one build serves machines with and
// without a GPU. The address never moves.
class Arena {
 public:
  // std::invalid_argument on bad arguments, std::bad_alloc without memory. Never fails for want of a GPU.
  Arena(size_t bytes, bool page_locked, int device);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }
  // By what address a kernel reads it; null where it is not page-locked.
  void* device_data() const { return device_data_; }
  bool page_locked() const { return device_data_ != nullptr; }
  // Why it is not page-locked; empty where it is.
  const std::string& reason() const { return reason_; }

 private:
  void lock(int device);

  void* data_ = nullptr;
  void* device_data_ = nullptr;
  size_t size_;
  size_t mapped_;
  int device_;
  pid_t owner_;
  std::string reason_;
};

}  // namespace ragturbo
