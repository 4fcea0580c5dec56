#include "store.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <limits>
#include <mutex>
#include <system_error>

#include "crc32.hpp"
#include "mapped.hpp"
#include "pool.hpp"

namespace ragturbo {
namespace {

// A checksum is computed while the bytes are still in the CPU cache.
constexpr size_t kChunk = 256 * 1024;
// Below this, dispatch costs more than the copy.
constexpr size_t kLeastPart = 32 * 1024;
// Waking another thread takes longer than copying a few records of this many bytes together.
constexpr size_t kAlone = 64 * 1024, kFew = 8;

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

Store::Store(const std::vector<std::string>& paths, Layout layout, std::vector<uint64_t> counts) : layout_(layout) {
  if (paths.size() != counts.size())
    throw std::invalid_argument(number(paths.size()) + " paths but " + number(counts.size()) + " counts");
  if (layout_.payload == 0 || layout_.payload > layout_.record)
    throw std::invalid_argument("payload_bytes " + number(layout_.payload) + " must be in 1.." +
                                number(layout_.record) + " (record_bytes)");
  constexpr uint64_t limit = std::numeric_limits<int64_t>::max();
  fds_.reserve(paths.size());
  maps_.reserve(paths.size());
  try {
    for (size_t i = 0; i < paths.size(); ++i) {
      if (layout_.header > limit || counts[i] > (limit - layout_.header) / layout_.record)
        throw std::invalid_argument(paths[i] + ": " + number(counts[i]) + " records of " + number(layout_.record) +
                                    " bytes do not fit a file");
      const int fd = ::open(paths[i].c_str(), O_RDONLY | O_CLOEXEC);
      if (fd < 0) throw OpenError(errno, paths[i]);
      fds_.push_back(fd);
      struct stat status {};
      if (::fstat(fd, &status) != 0) throw OpenError(errno, paths[i]);
      if (S_ISDIR(status.st_mode)) throw OpenError(EISDIR, paths[i]);
      const uint64_t needed = layout_.header + counts[i] * layout_.record;
      if (static_cast<uint64_t>(status.st_size) < needed)
        throw std::invalid_argument(paths[i] + ": " + number(status.st_size) + " bytes, but " + number(counts[i]) +
                                    " records need " + number(needed));
#ifdef POSIX_FADV_RANDOM
      // Rows are requested in random order: read-ahead would push other rows out of the page cache.
      ::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
#endif
      maps_.emplace_back(fd, needed);
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) + counts[i]);
    }
  } catch (...) {
    for (int fd : fds_) ::close(fd);
    throw;
  }
}

Store::~Store() {
  for (int fd : fds_) ::close(fd);
}

std::vector<Store::Place> Store::check(const Request& request) const {
  if (request.threads < 1 || request.threads > kMaxThreads)
    throw std::invalid_argument("threads=" + std::to_string(request.threads) + " must be in 1.." +
                                std::to_string(kMaxThreads));
  if (request.slot_bytes < layout_.payload)
    throw std::invalid_argument("slot_bytes " + number(request.slot_bytes) + " is less than the payload's " +
                                number(layout_.payload));
  // The last slot needs room for its payload only.
  const size_t slots =
      request.dst_bytes < layout_.payload ? 0 : (request.dst_bytes - layout_.payload) / request.slot_bytes + 1;
  const uint64_t all = ends_.empty() ? 0 : ends_.back();
  std::vector<Place> places;
  std::vector<int64_t> taken;
  places.reserve(request.n);
  for (size_t i = 0; i < request.n; ++i) {
    const int64_t row = request.rows[i], slot = request.slots ? request.slots[i] : static_cast<int64_t>(i);
    const auto refuse = [i](const char* what, int64_t value, uint64_t count) {
      throw std::out_of_range("record " + number(i) + " of the request: " + what + " " + std::to_string(value) +
                              " of " + number(count));
    };
    if (row < 0 || static_cast<uint64_t>(row) >= all) refuse("row", row, all);
    if (slot < 0 || static_cast<uint64_t>(slot) >= slots) refuse("slot", slot, slots);
    const size_t file = std::upper_bound(ends_.begin(), ends_.end(), static_cast<uint64_t>(row)) - ends_.begin();
    const uint64_t first = file ? ends_[file - 1] : 0;
    places.push_back({file, layout_.header + (static_cast<uint64_t>(row) - first) * layout_.record});
    if (request.slots) taken.push_back(slot);
  }
  std::sort(taken.begin(), taken.end());
  const auto twice = std::adjacent_find(taken.begin(), taken.end());
  if (twice != taken.end()) throw std::invalid_argument("slot " + std::to_string(*twice) + " is given twice");
  return places;
}

bool Store::read_part(Place place, bool mapped, const Request& request, Part part, Failure& failure) const {
  const size_t i = part.record, slot = request.slots ? static_cast<size_t>(request.slots[i]) : i;
  unsigned char* out = request.dst + slot * request.slot_bytes;
  uint32_t crc = 0;
  for (size_t done = part.begin; done < part.end;) {
    const size_t wanted = std::min<size_t>(part.end - done, kChunk);
    const uint64_t at = place.offset + done;
    if (mapped && !maps_[place.file].copy(out + done, at, wanted)) mapped = false;
    const ssize_t got = mapped ? static_cast<ssize_t>(wanted)
                               : ::pread(fds_[place.file], out + done, wanted, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      failure = {i, Failure::Kind::io, describe(errno) + " at byte " + number(at)};
      return false;
    }
    if (got == 0) {
      failure = {i, Failure::Kind::too_short,
                 "the file ends at byte " + number(at) + ", the record at " + number(place.offset + layout_.payload)};
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
  const std::vector<Place> places = check(request);
  std::vector<Failure> failures;
  std::mutex mutex;
  const bool mapped = Mapped::guarded();
  const int threads = request.n <= kFew && request.n * layout_.payload <= kAlone ? 1 : request.threads;
  // A few records are split into parts to keep every thread busy, unless they are checksummed: a CRC covers a record.
  size_t parts = 1, size = layout_.payload;
  if (!request.crcs && threads > 1 && request.n > 0 && request.n < 2 * static_cast<size_t>(threads)) {
    const size_t wanted = (2 * static_cast<size_t>(threads) + request.n - 1) / request.n;
    parts = std::clamp<size_t>(layout_.payload / kLeastPart, 1, wanted);
    size = (layout_.payload + parts - 1) / parts;
    parts = (layout_.payload + size - 1) / size;
  }
  run_parallel(request.n * parts, threads, [&](size_t task) {
    const size_t i = task / parts, begin = task % parts * size;
    Failure failure{};
    const Part part{i, begin, std::min<size_t>(begin + size, layout_.payload)};
    if (read_part(places[i], mapped, request, part, failure)) return;
    std::lock_guard lock(mutex);
    failures.push_back(std::move(failure));
  });
  // One failure is reported for a record that failed in several parts.
  std::sort(failures.begin(), failures.end(), [](const Failure& a, const Failure& b) { return a.index < b.index; });
  const auto same = [](const Failure& a, const Failure& b) { return a.index == b.index; };
  failures.erase(std::unique(failures.begin(), failures.end(), same), failures.end());
  return failures;
}

}  // namespace ragturbo
