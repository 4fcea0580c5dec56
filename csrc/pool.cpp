#include "pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace ragturbo {
namespace {

constexpr std::chrono::microseconds kSpin{30};

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
      for (int i = 0; i < std::min(helpers, workers_); ++i) wanted_.push_back(&job);
    }
    work_.notify_all();
    job.work();
    // Every task is taken. A call for help that nobody has answered is withdrawn: a busy pool never delays the caller.
    std::unique_lock lock(mutex_);
    wanted_.erase(std::remove(wanted_.begin(), wanted_.end(), &job), wanted_.end());
    lock.unlock();
    // The helpers are in the middle of their last tasks. To be put to sleep and woken takes as long as such a task.
    const auto patience = std::chrono::steady_clock::now() + kSpin;
    while (job.helpers.load(std::memory_order_acquire) != 0 && std::chrono::steady_clock::now() < patience) {
    }
    if (job.helpers.load(std::memory_order_acquire) == 0) return;
    lock.lock();
    done_.wait(lock, [&] { return job.helpers.load(std::memory_order_acquire) == 0; });
  }

 private:
  void start(int helpers) {
    while (workers_ < std::min(helpers, kMaxThreads)) {
      try {
        // Detached: the pool lives as long as the process.
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the caller does the work
      }
      ++workers_;
    }
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return !wanted_.empty(); });
      Job* job = wanted_.front();
      wanted_.pop_front();
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      // The caller may be gone with its job as soon as this is zero.
      if (job->helpers.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job*> wanted_;
  int workers_ = 0;
};

std::atomic<Pool*> current{nullptr};

Pool& pool() {
  // After fork only the forking thread lives on, so the child forgets the parent's pool and makes its own.
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
