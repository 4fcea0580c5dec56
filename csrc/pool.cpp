#include "pool.hpp"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace ragturbo {
namespace {

// Sleeping and waking takes tens of microseconds, as long as copying a few records, so threads spin this long first.
constexpr std::chrono::microseconds kSpin{50};

template <typename Condition>
bool spin_until(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  while (!condition())
    if (std::chrono::steady_clock::now() >= until) return false;
  return true;
}

struct Job {
  const std::function<void(size_t)>& body;
  size_t tasks;
  std::atomic<size_t> next{0};
  std::atomic<int> helpers{0};  // raised under the pool's mutex, and only while the job is wanted

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(i);
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    {
      std::lock_guard lock(mutex_);
      start(helpers);
      keep_off_this_processor();
      for (int i = 0; i < std::min(helpers, workers_); ++i) wanted_.push_back(&job);
      calls_.store(wanted_.size(), std::memory_order_release);
    }
    work_.notify_all();
    job.work();
    // Every task has started. Pending requests for helpers are cancelled: a busy pool must not delay the caller.
    std::unique_lock lock(mutex_);
    wanted_.erase(std::remove(wanted_.begin(), wanted_.end(), &job), wanted_.end());
    calls_.store(wanted_.size(), std::memory_order_release);
    lock.unlock();
    // Helpers may still run their last tasks.
    const auto done = [&] { return job.helpers.load(std::memory_order_acquire) == 0; };
    if (spin_until(done)) return;
    lock.lock();
    done_.wait(lock, done);
  }

 private:
  void start(int helpers) {
    while (workers_ < std::min(helpers, kMaxThreads)) {
      try {
        // Detached: the pool lives as long as the process.
        std::thread thread([this] { serve(); });
#ifdef __linux__
        handles_.push_back(thread.native_handle());
        avoided_ = -1;
#endif
        thread.detach();
      } catch (const std::system_error&) {
        return;  // no more threads: the caller does the work
      }
      ++workers_;
    }
  }

  // Linux may wake a helper on its caller's processor, where it waits until the work is done although other processors
  // are idle. So helpers may run on every processor but that one.
  void keep_off_this_processor() {
#ifdef __linux__
    const int here = ::sched_getcpu();
    if (here == avoided_ || here < 0) return;
    cpu_set_t others;
    if (::sched_getaffinity(0, sizeof others, &others) != 0) return;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0) return;
    for (pthread_t handle : handles_) ::pthread_setaffinity_np(handle, sizeof others, &others);
    avoided_ = here;
#endif
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      if (wanted_.empty()) {
        lock.unlock();
        spin_until([&] { return calls_.load(std::memory_order_acquire) != 0; });
        lock.lock();
        work_.wait(lock, [&] { return !wanted_.empty(); });
      }
      Job* job = wanted_.front();
      wanted_.pop_front();
      calls_.store(wanted_.size(), std::memory_order_release);
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      // The caller may return, and its job be destroyed, as soon as this is zero.
      if (job->helpers.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job*> wanted_;
  std::atomic<size_t> calls_{0};  // wanted_.size(), readable without the mutex
  int workers_ = 0;
#ifdef __linux__
  std::vector<pthread_t> handles_;
  int avoided_ = -1;  // processor that helpers do not run on
#endif
};

std::atomic<Pool*> current{nullptr};

Pool& pool() {
  // Only the forking thread exists in a forked child, so the child makes its own pool.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)registered;
  Pool* there = current.load();
  if (there) return *there;
  auto* fresh = new Pool;
  if (current.compare_exchange_strong(there, fresh)) return *fresh;
  delete fresh;
  return *there;
}

}  // namespace

void run_parallel(size_t tasks, int threads, const std::function<void(size_t)>& body) {
  Job job{body, tasks};
  const int helpers = static_cast<int>(std::min<size_t>(tasks, static_cast<size_t>(std::max(threads, 1)))) - 1;
  if (helpers < 1) return job.work();
  pool().run(job, helpers);
}

}  // namespace ragturbo
