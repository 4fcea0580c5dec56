#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ragturbo {

// Record r of a file is the `payload` bytes at `header + r * record`.
struct Layout {
  uint64_t header;
  uint64_t record;
  uint64_t payload;
};

struct Failure {
  enum class Kind { io, too_short, crc };
  size_t index;
  Kind kind;
  std::string detail;
};

// A file could not be opened: errno and the path.
struct OpenError : std::runtime_error {
  OpenError(int code, const std::string& path);
  int code;
  std::string path;
};

// One read: n records, each to slot i (or slots[i]) of `dst`. Rows count through all files. slots and crcs may be null.
struct Request {
  const int64_t* rows;
  const int64_t* slots;
  const uint32_t* crcs;
  size_t n;
  unsigned char* dst;
  size_t dst_bytes;
  size_t slot_bytes;
  int threads;
};

class Mapped;

// Fixed-size records in many files. Records in the page cache are copied from a map of their file, others are read with
// pread. If a copy fails, pread is tried: a file that shrinks while it is read is a short read, not a SIGBUS.
class Store {
 public:
  Store(const std::vector<std::string>& paths, Layout layout, std::vector<uint64_t> counts);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // Checks the whole request first (std::out_of_range, std::invalid_argument), then reads. Thread-safe.
  std::vector<Failure> read(const Request& request) const;

  const Layout& layout() const { return layout_; }

 private:
  // Where a record is stored.
  struct Place {
    size_t file;
    uint64_t offset;
  };
  // Bytes begin…end of one record of a request.
  struct Part {
    size_t record, begin, end;
  };

  std::vector<Place> check(const Request& request) const;
  bool read_part(Place place, bool mapped, const Request& request, Part part, Failure& failure) const;

  Layout layout_;
  std::vector<uint64_t> ends_;  // number of rows in files 0…i
  std::vector<int> fds_;
  std::vector<Mapped> maps_;
};

}  // namespace ragturbo
