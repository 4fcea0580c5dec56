// A stand-in for libcuda.so.1 with one device: it keeps count of what a real driver would hold, and aborts on misuse
// (memory registered twice, unregistered without a context, contexts popped or released more often than taken).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace {

std::map<void*, size_t> registered;
int retained = 0, pushed = 0;

void insist(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "stand-in driver: %s\n", what);
  std::abort();
}

struct AtExit {
  ~AtExit() {
    insist(registered.empty(), "memory is still registered at exit");
    insist(retained == 0, "the primary context is still retained at exit");
    insist(pushed == 0, "a context is still current at exit");
  }
} at_exit;

}  // namespace

extern "C" {

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }

int cuDeviceGet(int* device, int ordinal) {
  *device = 70;
  return ordinal == 0 ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  insist(device == 70, "unknown device");
  *context = &retained;
  ++retained;
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  insist(device == 70, "unknown device");
  insist(--retained >= 0, "the primary context was released too often");
  return 0;
}

int cuCtxPushCurrent_v2(void* context) {
  insist(context == &retained, "unknown context");
  ++pushed;
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  insist(--pushed >= 0, "no context to pop");
  *context = &retained;
  return 0;
}

int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned flags) {
  insist(pushed == 1 && retained >= 1, "registered without a context");
  insist(flags == 3, "not portable and mapped");
  insist(reinterpret_cast<uintptr_t>(memory) % 4096 == 0 && bytes % 4096 == 0, "not whole pages");
  insist(registered.emplace(memory, bytes).second, "registered twice");
  return 0;
}

int cuMemHostUnregister(void* memory) {
  insist(pushed == 1 && retained >= 1, "unregistered without a context");
  insist(registered.erase(memory) == 1, "unregistered what was not registered");
  return 0;
}

int cuMemHostGetDevicePointer_v2(uint64_t* address, void* memory, unsigned flags) {
  insist(flags == 0 && registered.count(memory) == 1, "not registered");
  *address = reinterpret_cast<uintptr_t>(memory);
  return 0;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 101 ? "invalid device ordinal" : "unknown error";
  return 0;
}
}
