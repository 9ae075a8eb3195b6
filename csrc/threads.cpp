#include "threads.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace fastcascade {
namespace {

constexpr int kIdleSpins = 2000;  // a helper spins for some 50 µs after a job, then sleeps

#if defined(__linux__)

int current_processor() { return sched_getcpu(); }

// The system often wakes a helper on the processor of the thread that posts the job, and leaves both there for
// milliseconds, in turns. A helper that finds itself there asks for any other processor, and then again for all that
// it had, so that only its place changes. Where there is no other, or the system refuses, it stays.
void leave_processor(int processor) {
  if (sched_getcpu() != processor) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  if (sched_setaffinity(0, sizeof allowed, &allowed) == 0) return;
  std::memset(&allowed, 0xff, sizeof allowed);  // the system has just taken some away; it grants what is left
  sched_setaffinity(0, sizeof allowed, &allowed);
}

#else

int current_processor() { return -1; }
void leave_processor(int) {}

#endif

struct Job {
  const TeamWork* work;
  int processor;    // where the caller was when it posted the job
  int helpers = 0;  // invited
  int vacancies = 0;
  int next_rank = 1;
  std::atomic<int> running{0};  // helpers inside work
};

class HelperPool {
 public:
  const pid_t owner = getpid();

  void run(int threads, const TeamWork& work) {
    Job job{&work, current_processor()};
    post(job, threads - 1);
    std::exception_ptr error;
    try {
      work(0, job.helpers);
    } catch (...) {
      error = std::current_exception();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    withdraw(&job);
    lock.unlock();
    // Helpers mostly end together with this thread: sleeping and being woken would take far longer.
    Backoff backoff;
    while (job.running.load() > 0 && backoff.count() < kIdleSpins) backoff.pause();
    lock.lock();
    done_.wait(lock, [&] { return job.running.load() == 0; });
    lock.unlock();
    if (error) std::rethrow_exception(error);
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;       // with vacancies
  std::atomic<int> pending_{0};  // jobs_.size(), for spinning helpers
  int idle_ = 0, starting_ = 0;

  // Invites as many of the wanted helpers as are idle or can be started. Nothing is listed if this throws.
  void post(Job& job, int wanted) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.reserve(jobs_.size() + 1);
      while (idle_ + starting_ < wanted && start_helper()) {
      }
      job.helpers = job.vacancies = std::min(wanted, idle_ + starting_);
      if (job.helpers == 0) return;
      jobs_.push_back(&job);
      pending_.fetch_add(1);
    }
    wake_.notify_all();
  }

  // False where the system has no more threads, or no memory for one.
  bool start_helper() {
    try {
      std::thread([this] { help(); }).detach();
    } catch (const std::exception&) {
      return false;
    }
    ++starting_;  // the helper itself waits for mutex_ first
    return true;
  }

  void withdraw(Job* job) {
    const auto at = std::find(jobs_.begin(), jobs_.end(), job);
    if (at == jobs_.end()) return;
    jobs_.erase(at);
    pending_.fetch_sub(1);
  }

  [[noreturn]] void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    --starting_;
    for (;;) {
      ++idle_;
      if (jobs_.empty()) {
        lock.unlock();
        Backoff backoff;
        while (pending_.load() == 0 && backoff.count() < kIdleSpins) backoff.pause();
        lock.lock();
      }
      wake_.wait(lock, [&] { return !jobs_.empty(); });
      --idle_;
      Job* job = jobs_.front();
      const int rank = job->next_rank++;
      ++job->running;
      if (--job->vacancies == 0) withdraw(job);
      lock.unlock();
      leave_processor(job->processor);
      (*job->work)(rank, job->helpers);
      lock.lock();
      if (--job->running == 0) done_.notify_all();
    }
  }
};

// The pool of this process. A child process after fork has none of its parent's threads, and their locks may be held
// for ever, so it makes a pool of its own and never touches the parent's. Pools are never destroyed: helpers may
// still sleep in them when the process ends.
HelperPool& pool() {
  static std::atomic<HelperPool*> current{nullptr};
  HelperPool* found = current.load();
  if (found && found->owner == getpid()) return *found;
  auto* fresh = new HelperPool;
  if (current.compare_exchange_strong(found, fresh)) return *fresh;
  delete fresh;
  return *found;
}

}  // namespace

void run_on_helpers(int threads, const TeamWork& work) {
  if (threads <= 1) return work(0, 0);
  pool().run(threads, work);
}

void spin_once() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

void Backoff::pause() {
  ++count_;
  if (count_ % 64 == 0)
    std::this_thread::yield();
  else
    spin_once();
}

}  // namespace fastcascade
