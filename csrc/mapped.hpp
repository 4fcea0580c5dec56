#pragma once
#include <cstddef>
#include <cstdint>

namespace ragturbo {

// The first `bytes` of an open file as memory, for copies out of the page cache that spare the kernel's own, which goes
// page by page. It never reads from a disk and never fails: what it cannot copy, the caller reads.
class Mapped {
 public:
  // Not mapped (`mapped` is false) where the system does not allow it, or does not say what lies in the page cache.
  Mapped(int fd, uint64_t bytes);
  ~Mapped();
  Mapped(Mapped&& other) noexcept;
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  bool mapped() const { return base_ != nullptr; }

  // True once `n` bytes from `offset` on are in `out`. False, with anything in `out`, where some of them are not in
  // the page cache, lie beyond the mapping, or went away meanwhile: a file cut short, a disk that fails.
  bool copy(unsigned char* out, uint64_t offset, size_t n) const;

  // Whether a page that goes away while it is copied comes back to `copy`: SIGBUS is one handler for the process, and
  // whoever took it after us has it. Ask before copying.
  static bool guarded();

 private:
  unsigned char* base_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace ragturbo
