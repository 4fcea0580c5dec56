#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace ragturbo {

// Record r of a segment is the `payload` bytes at `header + r * record` of its file.
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

// One read: n records, each to slot i (or slots[i]) of `dst`; crcs may be null.
struct Request {
  const int32_t* segments;
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

// Fixed-size records in many files. What lies in the page cache is copied from a map of its file, the rest is read: so is
// whatever the map fails at, which makes a file that shrinks under the reader a short read to report, not a SIGBUS.
class Store {
 public:
  Store(const std::vector<std::string>& paths, Layout layout, std::vector<uint64_t> counts);

  // Rows counted through all files, in order, as files and rows of those (std::out_of_range).
  struct Places {
    std::vector<int32_t> segments;
    std::vector<int64_t> rows;
  };
  Places locate(const int64_t* rows, size_t n) const;

  // Checks the whole request first (std::out_of_range, std::invalid_argument), then reads. Thread-safe.
  std::vector<Failure> read(const Request& request) const;

  // Files are closed once the reads in progress have ended; later reads are refused (std::invalid_argument).
  void close();
  bool closed() const;
  const Layout& layout() const { return layout_; }

 private:
  struct Files;

  std::shared_ptr<const Files> files() const;
  void check(const Request& request) const;
  // Bytes begin…end of one record of a request.
  struct Part {
    size_t record, begin, end;
  };
  bool read_part(int fd, const Mapped* map, const Request& request, Part part, Failure& failure) const;

  Layout layout_;
  std::vector<uint64_t> counts_;
  std::vector<uint64_t> ends_;  // of each file's rows, counted through all of them
  mutable std::mutex mutex_;
  std::shared_ptr<const Files> files_;
};

}  // namespace ragturbo
