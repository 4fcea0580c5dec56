#include "store.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <system_error>

#include "crc32.hpp"
#include "mapped.hpp"
#include "pool.hpp"

namespace ragturbo {
namespace {

// A record is checked while its bytes are still in the cache they were just copied through.
constexpr size_t kChunk = 256 * 1024;
// Handing out less costs more than copying it.
constexpr size_t kLeastPart = 32 * 1024;

std::string number(uint64_t value) { return std::to_string(value); }

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

std::string describe(int code) { return std::generic_category().message(code); }

}  // namespace

OpenError::OpenError(int code, const std::string& path)
    : std::runtime_error(path + ": " + describe(code)), code(code), path(path) {}

struct Store::Files {
  std::vector<int> fds;
  std::vector<Mapped> maps;

  Files() = default;
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;
  ~Files() {
    for (int fd : fds) ::close(fd);
  }
};

Store::Store(const std::vector<std::string>& paths, Layout layout, std::vector<uint64_t> counts)
    : layout_(layout), counts_(std::move(counts)) {
  if (paths.size() != counts_.size())
    throw std::invalid_argument(number(paths.size()) + " paths but " + number(counts_.size()) + " counts");
  if (layout_.payload == 0 || layout_.payload > layout_.record)
    throw std::invalid_argument("payload_bytes " + number(layout_.payload) + " must be in 1.." +
                                number(layout_.record) + " (record_bytes)");
  constexpr uint64_t limit = std::numeric_limits<int64_t>::max();
  auto files = std::make_shared<Files>();
  files->fds.reserve(paths.size());
  files->maps.reserve(paths.size());
  for (size_t s = 0; s < paths.size(); ++s) {
    if (layout_.header > limit || counts_[s] > (limit - layout_.header) / layout_.record)
      throw std::invalid_argument(paths[s] + ": " + number(counts_[s]) + " records of " + number(layout_.record) +
                                  " bytes do not fit a file");
    const int fd = ::open(paths[s].c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw OpenError(errno, paths[s]);
    files->fds.push_back(fd);
    struct stat status {};
    if (::fstat(fd, &status) != 0) throw OpenError(errno, paths[s]);
    if (S_ISDIR(status.st_mode)) throw OpenError(EISDIR, paths[s]);
    const uint64_t needed = layout_.header + counts_[s] * layout_.record;
    if (static_cast<uint64_t>(status.st_size) < needed)
      throw std::invalid_argument(paths[s] + ": " + number(status.st_size) + " bytes, but " + number(counts_[s]) +
                                  " records need " + number(needed));
#ifdef POSIX_FADV_RANDOM
    // Rows are asked for in random order: reading ahead would only push other rows out of the page cache.
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
#endif
    files->maps.emplace_back(fd, needed);
  }
  std::partial_sum(counts_.begin(), counts_.end(), std::back_inserter(ends_));
  files_ = std::move(files);
}

Store::Places Store::locate(const int64_t* rows, size_t n) const {
  Places places;
  places.segments.reserve(n);
  places.rows.reserve(n);
  const uint64_t all = ends_.empty() ? 0 : ends_.back();
  for (size_t i = 0; i < n; ++i) {
    const uint64_t row = static_cast<uint64_t>(rows[i]);
    if (rows[i] < 0 || row >= all)
      throw std::out_of_range("record " + number(i) + " of the request: row " + std::to_string(rows[i]) + " of " +
                              number(all));
    const size_t segment = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), row) - ends_.begin());
    places.segments.push_back(static_cast<int32_t>(segment));
    places.rows.push_back(static_cast<int64_t>(row - (ends_[segment] - counts_[segment])));
  }
  return places;
}

void Store::close() {
  std::lock_guard lock(mutex_);
  files_.reset();
}

bool Store::closed() const {
  std::lock_guard lock(mutex_);
  return files_ == nullptr;
}

std::shared_ptr<const Store::Files> Store::files() const {
  std::lock_guard lock(mutex_);
  if (!files_) throw std::invalid_argument("the store is closed");
  return files_;
}

void Store::check(const Request& request) const {
  if (request.threads < 1 || request.threads > kMaxThreads)
    throw std::invalid_argument("threads=" + std::to_string(request.threads) + " must be in 1.." +
                                std::to_string(kMaxThreads));
  if (request.slot_bytes < layout_.payload)
    throw std::invalid_argument("slot_bytes " + number(request.slot_bytes) + " is less than the payload's " +
                                number(layout_.payload));
  // The last slot needs room for its payload alone.
  const size_t slots =
      request.dst_bytes < layout_.payload ? 0 : (request.dst_bytes - layout_.payload) / request.slot_bytes + 1;
  std::vector<int64_t> taken;
  for (size_t i = 0; i < request.n; ++i) {
    const int64_t segment = request.segments[i], row = request.rows[i];
    const int64_t slot = request.slots ? request.slots[i] : static_cast<int64_t>(i);
    const auto place = [i] { return "record " + number(i) + " of the request: "; };
    if (segment < 0 || static_cast<uint64_t>(segment) >= counts_.size())
      throw std::out_of_range(place() + "segment " + std::to_string(segment) + " of " + number(counts_.size()));
    if (row < 0 || static_cast<uint64_t>(row) >= counts_[segment])
      throw std::out_of_range(place() + "row " + std::to_string(row) + " of " + number(counts_[segment]) +
                              " in segment " + std::to_string(segment));
    if (slot < 0 || static_cast<uint64_t>(slot) >= slots)
      throw std::out_of_range(place() + "slot " + std::to_string(slot) + " of " + number(slots) + " in the destination");
    if (request.slots) taken.push_back(slot);
  }
  std::sort(taken.begin(), taken.end());
  const auto twice = std::adjacent_find(taken.begin(), taken.end());
  if (twice != taken.end()) throw std::invalid_argument("slot " + std::to_string(*twice) + " is given twice");
}

bool Store::read_part(int fd, const Mapped* map, const Request& request, Part part, Failure& failure) const {
  const size_t i = part.record;
  const uint64_t offset = layout_.header + static_cast<uint64_t>(request.rows[i]) * layout_.record;
  const size_t slot = request.slots ? static_cast<size_t>(request.slots[i]) : i;
  unsigned char* out = request.dst + slot * request.slot_bytes;
  uint32_t crc = 0;
  for (size_t done = part.begin; done < part.end;) {
    const size_t wanted = std::min<size_t>(part.end - done, kChunk);
    // What the map cannot give is read, and the read knows why.
    if (map && !map->copy(out + done, offset + done, wanted)) map = nullptr;
    const ssize_t got = map ? static_cast<ssize_t>(wanted)
                            : ::pread(fd, out + done, wanted, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      failure = {i, Failure::Kind::io, describe(errno) + " at byte " + number(offset + done)};
      return false;
    }
    if (got == 0) {
      failure = {i, Failure::Kind::too_short,
                 "the file ends at byte " + number(offset + done) + ", the record at " +
                     number(offset + layout_.payload)};
      return false;
    }
    if (request.crcs) crc = crc32(out + done, static_cast<size_t>(got), crc);
    done += static_cast<size_t>(got);
  }
  if (request.crcs && crc != request.crcs[i]) {
    failure = {i, Failure::Kind::crc, "CRC-32 " + hex(crc) + ", expected " + hex(request.crcs[i])};
    return false;
  }
  return true;
}

std::vector<Failure> Store::read(const Request& request) const {
  const auto files = this->files();
  check(request);
  std::vector<Failure> failures;
  std::mutex mutex;
  const bool mapped = Mapped::guarded();
  // Fewer records than would keep every thread busy are cut in parts; a checksum is of a whole record.
  size_t parts = 1, size = layout_.payload;
  if (!request.crcs && request.threads > 1 && request.n > 0 && request.n < 2 * static_cast<size_t>(request.threads)) {
    const size_t wanted = (2 * static_cast<size_t>(request.threads) + request.n - 1) / request.n;
    parts = std::clamp<size_t>(layout_.payload / kLeastPart, 1, wanted);
    size = (layout_.payload + parts - 1) / parts;
    parts = (layout_.payload + size - 1) / size;
  }
  run_parallel(request.n * parts, request.threads, [&](size_t task) {
    const size_t i = task / parts, begin = task % parts * size;
    const size_t segment = static_cast<size_t>(request.segments[i]);
    const Mapped* map = mapped ? &files->maps[segment] : nullptr;
    Failure failure{};
    const Part part{i, begin, std::min<size_t>(begin + size, layout_.payload)};
    if (read_part(files->fds[segment], map, request, part, failure)) return;
    std::lock_guard lock(mutex);
    failures.push_back(std::move(failure));
  });
  // Of a record that failed in several parts, one is told.
  std::sort(failures.begin(), failures.end(), [](const Failure& a, const Failure& b) { return a.index < b.index; });
  const auto same = [](const Failure& a, const Failure& b) { return a.index == b.index; };
  failures.erase(std::unique(failures.begin(), failures.end(), same), failures.end());
  return failures;
}

}  // namespace ragturbo
