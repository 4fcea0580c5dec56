#pragma once
#include <cstddef>
#include <cstdint>

namespace ragturbo {

// A map of the first `bytes` of an open file, to copy from the page cache faster than pread, which copies page by page.
// It never reads from the disk: if it cannot copy, the caller must read.
class Mapped {
 public:
  // `mapped()` is false if the system does not allow the map or does not say which pages are in the page cache.
  Mapped(int fd, uint64_t bytes);
  ~Mapped();
  Mapped(Mapped&& other) noexcept;
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  bool mapped() const { return base_ != nullptr; }

  // Copies `n` bytes from `offset`. Returns false, with undefined bytes in `out`, if some are not in the page cache, are
  // beyond the map, or disappeared during the copy (the file was truncated, or the disk failed).
  bool copy(unsigned char* out, uint64_t offset, size_t n) const;

  // Whether our SIGBUS handler is installed. A process has one handler, and other code may have replaced ours: call
  // this before copying.
  static bool guarded();

 private:
  unsigned char* base_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace ragturbo
