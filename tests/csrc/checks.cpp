// The native parts under the sanitizers, without Python: every check is an ordinary use or an attempt to misuse.
// usage: checks FOLDER; prints one line a check and exits 1 at the first that fails.
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <thread>

#include "../../csrc/crc32.hpp"
#include "../../csrc/mapped.hpp"
#include "../../csrc/pinned.hpp"
#include "../../csrc/pool.hpp"
#include "../../csrc/store.hpp"

using namespace ragturbo;

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);            \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

template <typename Error>
bool raises(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error&) {
    return true;
  }
  return false;
}

std::vector<unsigned char> random_bytes(size_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<unsigned char> bytes(n);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(engine());
  return bytes;
}

uint32_t crc32_bit_by_bit(const unsigned char* p, size_t n) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < n; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0xEDB88320u : 0);
  }
  return ~crc;
}

void crc_of_every_length_and_alignment() {
  const auto bytes = random_bytes(4096, 1);
  for (size_t n = 0; n <= 300; ++n)
    for (size_t offset : {0, 1, 7, 15}) {
      const uint32_t expected = crc32_bit_by_bit(bytes.data() + offset, n);
      CHECK(crc32_slice16(bytes.data() + offset, n, 0) == expected);
      if (has_pclmul()) CHECK(crc32_pclmul(bytes.data() + offset, n, 0) == expected);
      const size_t half = n / 2;
      CHECK(crc32(bytes.data() + offset + half, n - half, crc32(bytes.data() + offset, half)) == expected);
    }
  CHECK(crc32("123456789", 9) == 0xCBF43926u);
}

void every_task_runs_once_from_many_callers() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller)
    callers.emplace_back([caller] {
      for (int round = 0; round < 40; ++round) {
        const size_t tasks = static_cast<size_t>(round * 7 + caller);
        std::vector<std::atomic<int>> ran(tasks);
        run_parallel(tasks, 1 + round % 5, [&](size_t i) { ran[i].fetch_add(1); });
        for (auto& count : ran) CHECK(count.load() == 1);
      }
    });
  for (auto& caller : callers) caller.join();
}

constexpr size_t kHeader = 4096, kRecord = 1024, kPayload = 1000, kCount = 300, kSegments = 3;

struct Database {
  std::vector<std::string> paths;
  std::vector<std::vector<unsigned char>> contents;
  std::vector<uint64_t> counts;

  explicit Database(const std::string& folder) {
    for (size_t s = 0; s < kSegments; ++s) {
      paths.push_back(folder + "/" + std::to_string(s) + ".hseg");
      contents.push_back(random_bytes(kHeader + kCount * kRecord + 77, static_cast<unsigned>(s)));
      counts.push_back(kCount);
      std::ofstream out(paths[s], std::ios::binary);
      out.write(reinterpret_cast<const char*>(contents[s].data()), static_cast<std::streamsize>(contents[s].size()));
    }
  }
  Store open() const { return Store(paths, {kHeader, kRecord, kPayload}, counts); }
  const unsigned char* record(int32_t s, int64_t r) const { return contents[s].data() + kHeader + r * kRecord; }
};

struct Rows {
  std::vector<int32_t> segments;
  std::vector<int64_t> rows, all, slots;
  std::vector<uint32_t> crcs;
  std::vector<unsigned char> out;

  Rows(const Database& database, size_t n, unsigned seed) : out(n * kRecord, 0xAA) {
    std::mt19937 engine(seed);
    for (size_t i = 0; i < n; ++i) {
      segments.push_back(static_cast<int32_t>(engine() % kSegments));
      rows.push_back(static_cast<int64_t>(engine() % kCount));
      all.push_back(segments[i] * static_cast<int64_t>(kCount) + rows[i]);
      crcs.push_back(crc32(database.record(segments[i], rows[i]), kPayload));
    }
    slots.resize(n);
    std::iota(slots.rbegin(), slots.rend(), 0);
  }
  Request request(int threads) {
    return {all.data(), slots.data(), crcs.data(), all.size(), out.data(), out.size(), kRecord, threads};
  }
};

void rows_arrive_in_their_slots_and_nowhere_else(const Database& database) {
  const Store store = database.open();
  std::vector<std::thread> readers;
  for (unsigned reader = 0; reader < 8; ++reader)
    readers.emplace_back([&, reader] {
      for (unsigned round = 0; round < 10; ++round) {
        Rows want(database, 1 + reader * 9 + round, reader * 100 + round);
        CHECK(store.read(want.request(1 + static_cast<int>(round % 4))).empty());
        for (size_t i = 0; i < want.rows.size(); ++i) {
          const unsigned char* slot = want.out.data() + want.slots[i] * kRecord;
          CHECK(std::memcmp(slot, database.record(want.segments[i], want.rows[i]), kPayload) == 0);
          for (size_t b = kPayload; b < kRecord; ++b) CHECK(slot[b] == 0xAA);
        }
      }
    });
  for (auto& reader : readers) reader.join();
}

void damage_is_found_and_named(const Database& database) {
  const Store store = database.open();
  Rows want(database, 50, 3);
  want.crcs[7] ^= 1;
  want.crcs[31] ^= 0x80000000u;
  auto failures = store.read(want.request(4));
  CHECK(failures.size() == 2 && failures[0].index == 7 && failures[1].index == 31);
  CHECK(failures[0].kind == Failure::Kind::crc);

  Rows bad(database, 4000, 6);
  for (auto& crc : bad.crcs) ++crc;
  failures = store.read(bad.request(4));
  CHECK(failures.size() == 4000);
  for (size_t i = 0; i < failures.size(); ++i) CHECK(failures[i].index == i);

  // A file that shrinks after it was opened is a short read, not a SIGBUS.
  const off_t middle = kHeader + 100 * kRecord + 10;
  CHECK(::truncate(database.paths[1].c_str(), middle) == 0);
  Rows all(database, 120, 4);
  failures = store.read(all.request(4));
  size_t expected = 0;
  for (size_t i = 0; i < all.rows.size(); ++i) expected += all.segments[i] == 1 && all.rows[i] >= 100;
  CHECK(expected > 0 && failures.size() == expected);
  for (const Failure& failure : failures) CHECK(failure.kind == Failure::Kind::too_short);
  CHECK(raises<std::invalid_argument>([&] { database.open(); }));
}

struct File {
  std::string path;
  std::vector<unsigned char> bytes;
  int fd;

  File(const std::string& folder, size_t n) : path(folder + "/mapped"), bytes(random_bytes(n, 9)) {
    fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    fill();
  }
  ~File() { ::close(fd); }
  void fill() const { CHECK(::pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size())); }
};

void a_map_copies_what_is_there_or_says_no(const std::string& folder) {
  const File file(folder, 700000);
  const Mapped map(file.fd, file.bytes.size());
  CHECK(map.mapped() && Mapped::guarded());
  std::vector<unsigned char> out(file.bytes.size() + 2, 0xAA);
  for (size_t offset : {size_t{0}, size_t{1}, size_t{4095}, size_t{4096}, size_t{262144}, size_t{300001}})
    for (size_t n : {size_t{1}, size_t{4096}, size_t{262144}, size_t{399999}}) {
      CHECK(map.copy(out.data() + 1, offset, n));
      CHECK(std::memcmp(out.data() + 1, file.bytes.data() + offset, n) == 0);
      CHECK(out[0] == 0xAA && out[n + 1] == 0xAA);
      std::fill(out.begin(), out.end(), 0xAA);
    }
  CHECK(!map.copy(out.data(), 700000, 1) && !map.copy(out.data(), 1, 700000) && !map.copy(out.data(), UINT64_MAX, 2));
  CHECK(::ftruncate(file.fd, 5000) == 0);
  CHECK(map.copy(out.data(), 0, 4096) && !map.copy(out.data(), 4096, 8192));
  // Nothing of a file that is empty, or that may not be read, is mapped.
  CHECK(!Mapped(file.fd, 0).mapped() && !Mapped(-1, 10).mapped());
}

void a_file_cut_short_while_it_is_copied_is_no_signal(const std::string& folder) {
  const File file(folder, 400000);
  const Mapped map(file.fd, file.bytes.size());
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 3; ++reader)
    readers.emplace_back([&] {
      std::vector<unsigned char> out(250000);
      while (!stop.load()) map.copy(out.data(), 150000, out.size());
    });
  for (int round = 0; round < 300; ++round) {
    CHECK(::ftruncate(file.fd, 160000) == 0);
    file.fill();
  }
  stop = true;
  for (auto& reader : readers) reader.join();
}

sigjmp_buf back;

void another_signal_of_the_kind_goes_where_it_went(const std::string& folder) {
  // Before the first map, a handler of the program's own.
  struct sigaction mine {};
  mine.sa_handler = [](int) { siglongjmp(back, 1); };
  ::sigemptyset(&mine.sa_mask);
  CHECK(::sigaction(SIGBUS, &mine, nullptr) == 0);
  const File file(folder, 8192);
  const Mapped map(file.fd, file.bytes.size());
  void* other = ::mmap(nullptr, 8192, PROT_READ, MAP_SHARED, file.fd, 0);
  CHECK(other != MAP_FAILED && ::ftruncate(file.fd, 0) == 0);
  volatile bool came = false;
  if (sigsetjmp(back, 1) == 0) {
    (void)*static_cast<volatile unsigned char*>(other);
  } else {
    came = true;
  }
  CHECK(came && Mapped::guarded());
  // Who takes the signal afterwards has it: the map says so, and stores read.
  struct sigaction ours {};
  CHECK(::sigaction(SIGBUS, &mine, &ours) == 0);
  CHECK(!Mapped::guarded());
  const Database database(folder);
  const Store store = database.open();
  Rows want(database, 30, 1);
  CHECK(store.read(want.request(2)).empty());
  CHECK(::sigaction(SIGBUS, &ours, nullptr) == 0 && Mapped::guarded());
  ::munmap(other, 8192);
}

void misuse_is_refused_before_a_byte_is_written(const Database& database) {
  Store store = database.open();
  Rows want(database, 10, 5);
  const auto refuses = [&](auto change, bool range) {
    Rows bad(database, 10, 5);
    Request request = bad.request(2);
    change(bad, request);
    CHECK(range ? raises<std::out_of_range>([&] { store.read(request); })
                : raises<std::invalid_argument>([&] { store.read(request); }));
    for (unsigned char byte : bad.out) CHECK(byte == 0xAA);
  };
  refuses([](Rows& r, Request&) { r.all[9] = kSegments * kCount; }, true);
  refuses([](Rows& r, Request&) { r.all[9] = INT64_MAX; }, true);
  refuses([](Rows& r, Request&) { r.all[9] = -1; }, true);
  refuses([](Rows& r, Request&) { r.slots[9] = 10; }, true);
  refuses([](Rows& r, Request&) { r.slots[9] = INT64_MIN; }, true);
  refuses([](Rows& r, Request&) { r.slots[9] = r.slots[0]; }, false);
  refuses([](Rows&, Request& q) { q.dst_bytes = 0; }, true);
  refuses([](Rows&, Request& q) { q.slot_bytes = kPayload - 1; }, false);
  refuses([](Rows&, Request& q) { q.threads = 0; }, false);
  refuses([](Rows&, Request& q) { q.threads = kMaxThreads + 1; }, false);
  CHECK(raises<OpenError>([&] { Store({database.paths[0] + ".no"}, {0, 1, 1}, {1}); }));
  CHECK(raises<OpenError>([&] { Store({"/"}, {0, 1, 1}, {1}); }));
  CHECK(raises<std::invalid_argument>([&] { Store({database.paths[0]}, {0, 8, 9}, {1}); }));
  CHECK(raises<std::invalid_argument>([&] { Store({database.paths[0]}, {0, 8, 0}, {1}); }));
  CHECK(raises<std::invalid_argument>([&] { Store({database.paths[0]}, {0, 8, 8}, {UINT64_MAX}); }));
  CHECK(raises<std::invalid_argument>([&] { Store({database.paths[0]}, {UINT64_MAX, 8, 8}, {1}); }));
  CHECK(raises<std::invalid_argument>([&] { Store({database.paths[0]}, {0, 8, 8}, {}); }));
}

void an_arena_is_aligned_zeroed_and_says_what_it_is(bool driver) {
  for (size_t bytes : {size_t{1}, size_t{4096}, (size_t{2} << 20) + 1, size_t{150} << 20}) {
    Arena arena(bytes);
    auto* data = static_cast<unsigned char*>(arena.data());
    CHECK(reinterpret_cast<uintptr_t>(data) % (size_t{2} << 20) == 0 && arena.size() == bytes);
    CHECK(data[0] == 0 && data[bytes - 1] == 0);
    data[0] = data[bytes - 1] = 1;
    CHECK(arena.page_locked() == driver && arena.reason().empty() == driver);
    CHECK((arena.device_data() == arena.data()) == driver);
  }
  CHECK(raises<std::invalid_argument>([] { Arena(0); }));
  CHECK(raises<std::bad_alloc>([] { Arena(SIZE_MAX - 5); }));
  CHECK(raises<std::bad_alloc>([] { Arena(size_t{1} << 60); }));
}

int main(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[2] : "";
  if (argc < 2) return 2;
  if (mode.empty()) {
    const Database database(argv[1]);
    crc_of_every_length_and_alignment();
    every_task_runs_once_from_many_callers();
    another_signal_of_the_kind_goes_where_it_went(argv[1]);
    a_map_copies_what_is_there_or_says_no(argv[1]);
    a_file_cut_short_while_it_is_copied_is_no_signal(argv[1]);
    rows_arrive_in_their_slots_and_nowhere_else(database);
    misuse_is_refused_before_a_byte_is_written(database);
    damage_is_found_and_named(database);
  }
  an_arena_is_aligned_zeroed_and_says_what_it_is(mode == "driver");
  std::printf("all checks passed\n");
}
