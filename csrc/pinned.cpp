#include "pinned.hpp"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <thread>

#include "pool.hpp"

namespace ragturbo {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kTouch = size_t{64} << 20;

// The functions of the CUDA driver that page-locking needs, as declared in cuda.h.
struct Driver {
  using Result = int;
  using Context = void*;
  Result (*init)(unsigned) = nullptr;
  Result (*device_get)(int*, int) = nullptr;
  Result (*retain)(Context*, int) = nullptr;
  Result (*release)(int) = nullptr;
  Result (*push)(Context) = nullptr;
  Result (*pop)(Context*) = nullptr;
  Result (*host_register)(void*, size_t, unsigned) = nullptr;
  Result (*host_unregister)(void*) = nullptr;
  Result (*host_device_pointer)(uint64_t*, void*, unsigned) = nullptr;
  Result (*error_string)(Result, const char**) = nullptr;
  std::string missing;

  Driver() {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      missing = "no CUDA driver (libcuda.so.1) on this machine";
      return;
    }
    load(library, "cuInit", init);
    load(library, "cuDeviceGet", device_get);
    load(library, "cuDevicePrimaryCtxRetain", retain);
    load(library, "cuDevicePrimaryCtxRelease_v2", release);
    load(library, "cuCtxPushCurrent_v2", push);
    load(library, "cuCtxPopCurrent_v2", pop);
    load(library, "cuMemHostRegister_v2", host_register);
    load(library, "cuMemHostUnregister", host_unregister);
    load(library, "cuMemHostGetDevicePointer_v2", host_device_pointer);
    load(library, "cuGetErrorString", error_string);
  }

  template <typename Function>
  void load(void* library, const char* name, Function& entry) {
    entry = reinterpret_cast<Function>(::dlsym(library, name));
    if (!entry && missing.empty()) missing = std::string("the CUDA driver lacks ") + name;
  }

  std::string explain(const char* call, Result code) const {
    const char* text = nullptr;
    error_string(code, &text);
    return std::string(call) + ": " + (text ? text : "error " + std::to_string(code));
  }

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }
};

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Faults in every page, on several threads: the driver would use one. Returns false if memory runs out.
bool populate(void* data, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  std::atomic<bool> good{true};
  const int threads = static_cast<int>(std::thread::hardware_concurrency());
  run_parallel((bytes + kTouch - 1) / kTouch, threads, [&](size_t i) {
    const size_t begin = i * kTouch, length = bytes - begin < kTouch ? bytes - begin : kTouch;
    // Older kernels do not support it (EINVAL): then the driver faults the pages in.
    if (::madvise(static_cast<char*>(data) + begin, length, MADV_POPULATE_WRITE) != 0 && errno == ENOMEM) good = false;
  });
  return good;
#else
  (void)data, (void)bytes;
  return true;
#endif
}

}  // namespace

Arena::Arena(size_t bytes) : size_(bytes), owner_(::getpid()) {
  if (bytes == 0) throw std::invalid_argument("nbytes must be at least 1");
  if (bytes > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
  mapped_ = round_up(bytes, kHugePage);
  // Map one huge page more than needed and unmap what is outside the aligned range.
  const size_t whole = mapped_ + kHugePage;
  void* raw = ::mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = round_up(begin, kHugePage);
  if (aligned > begin) ::munmap(raw, aligned - begin);
  if (const size_t tail = whole - (aligned - begin) - mapped_) ::munmap(reinterpret_cast<void*>(aligned + mapped_), tail);
  data_ = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
  ::madvise(data_, mapped_, MADV_HUGEPAGE);
#endif
  lock();
}

void Arena::lock() {
  const Driver& cuda = Driver::get();
  if (!cuda.missing.empty()) {
    reason_ = cuda.missing;
    return;
  }
  Driver::Context context = nullptr;
  const auto failed = [&](const char* call, Driver::Result code) {
    if (code != 0) reason_ = cuda.explain(call, code);
    return code != 0;
  };
  if (failed("cuInit", cuda.init(0)) || failed("cuDeviceGet", cuda.device_get(&device_, 0))) return;
  // The primary context is the one that torch uses, so torch's kernels may read this memory.
  if (failed("cuDevicePrimaryCtxRetain", cuda.retain(&context, device_))) return;
  if (failed("cuCtxPushCurrent", cuda.push(context))) {
    cuda.release(device_);
    return;
  }
  constexpr unsigned kPortable = 1, kDeviceMap = 2;
  uint64_t address = 0;
  bool registered = false;
  if (!populate(data_, mapped_)) {
    reason_ = "not enough memory to lock " + std::to_string(mapped_) + " bytes";
  } else if (!failed("cuMemHostRegister", cuda.host_register(data_, mapped_, kPortable | kDeviceMap))) {
    registered = true;
    failed("cuMemHostGetDevicePointer", cuda.host_device_pointer(&address, data_, 0));
  }
  if (registered && address == 0) cuda.host_unregister(data_);
  device_data_ = reinterpret_cast<void*>(address);
  cuda.pop(&context);
  if (!device_data_) cuda.release(device_);
}

Arena::~Arena() {
  // A forked child has a copy of the memory but not the driver's state: only the owner unregisters it.
  if (device_data_ && ::getpid() == owner_) {
    const Driver& cuda = Driver::get();
    Driver::Context context = nullptr;
    if (cuda.retain(&context, device_) == 0) {
      if (cuda.push(context) == 0) {
        cuda.host_unregister(data_);
        cuda.pop(&context);
      }
      cuda.release(device_);
    }
    cuda.release(device_);
  }
  ::munmap(data_, mapped_);
}

}  // namespace ragturbo
