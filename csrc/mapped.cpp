#include "mapped.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#ifdef __linux__
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <string>

namespace ragturbo {
namespace {

constexpr size_t kPage = 4096;
// Pages checked and copied at a time: few, so that checked pages are still in the page cache when they are copied.
constexpr size_t kPages = 64;

struct Guard {
  sigjmp_buf back;
  const unsigned char *begin, *end;
};

// The copy in progress on this thread. Not thread_local, which may allocate at first use in a shared library: a signal
// handler must not allocate.
pthread_key_t guard;
struct sigaction previous;

void on_bus(int number, siginfo_t* info, void* context) {
  auto* own = static_cast<Guard*>(::pthread_getspecific(guard));
  const auto* at = static_cast<const unsigned char*>(info->si_addr);
  if (own && at >= own->begin && at < own->end) {
    // siglongjmp leaves the handler with its signals blocked: restore the mask.
    ::pthread_sigmask(SIG_SETMASK, &static_cast<ucontext_t*>(context)->uc_sigmask, nullptr);
    siglongjmp(own->back, 1);
  }
  // Not an access of ours: call the previous handler.
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(number, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(number);
  // There was none: restore the default or ignored action; the instruction runs again on return.
  ::sigaction(SIGBUS, &previous, nullptr);
}

bool install() {
  if (::pthread_key_create(&guard, nullptr) != 0) return false;
  struct sigaction action {};
  action.sa_sigaction = on_bus;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  ::sigemptyset(&action.sa_mask);
  return ::sigaction(SIGBUS, &action, &previous) == 0;
}

// A separate function without locals that change after sigsetjmp: a jump leaves their values unspecified.
__attribute__((noinline)) bool copy_guarded(unsigned char* out, const unsigned char* from, size_t n) {
  Guard own;
  own.begin = from;
  own.end = from + n;
  if (sigsetjmp(own.back, 0)) {
    ::pthread_setspecific(guard, nullptr);
    return false;
  }
  if (::pthread_setspecific(guard, &own) != 0) return false;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::memcpy(out, from, n);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  ::pthread_setspecific(guard, nullptr);
  return true;
}

// mincore reports every page as present to users who neither own the file nor may write to it.
bool mincore_is_true(int fd) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) return false;
  return status.st_uid == ::geteuid() || ::access(("/proc/self/fd/" + std::to_string(fd)).c_str(), W_OK) == 0;
}

}  // namespace

Mapped::Mapped(int fd, uint64_t bytes) {
  static const bool installed = install();
  if (!installed || bytes == 0 || bytes > SIZE_MAX) return;
  if (::sysconf(_SC_PAGESIZE) != static_cast<long>(kPage) || !mincore_is_true(fd)) return;
  void* base = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return;
  base_ = static_cast<unsigned char*>(base);
  bytes_ = bytes;
}

Mapped::~Mapped() {
  if (base_) ::munmap(base_, bytes_);
}

bool Mapped::guarded() {
  struct sigaction now {};
  return ::sigaction(SIGBUS, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus;
}

bool Mapped::copy(unsigned char* out, uint64_t offset, size_t n) const {
  if (!base_ || n > bytes_ || offset > bytes_ - n) return false;
  for (size_t done = 0; done < n;) {
    const uint64_t at = offset + done, first = at / kPage * kPage;
    const size_t part = std::min<uint64_t>(n - done, first + kPages * kPage - at);
    unsigned char present[kPages];
    if (::mincore(base_ + first, at + part - first, present) != 0) return false;
    const size_t pages = (at + part - first + kPage - 1) / kPage;
    // A page fault would read one page from the disk; pread reads the whole record.
    if (!std::all_of(present, present + pages, [](unsigned char page) { return page & 1; })) return false;
    if (!copy_guarded(out + done, base_ + at, part)) return false;
    done += part;
  }
  return true;
}

#else

namespace ragturbo {

Mapped::Mapped(int, uint64_t) {}
Mapped::~Mapped() = default;
bool Mapped::guarded() { return false; }
bool Mapped::copy(unsigned char*, uint64_t, size_t) const { return false; }

#endif

Mapped::Mapped(Mapped&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

}  // namespace ragturbo
