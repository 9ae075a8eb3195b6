// A process-wide pool of helper threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fastcascade {

// Calls work(0) here and work(1), work(2), … on up to threads − 1 helpers, each rank at most once, and returns
// when every call that began has ended. A helper that has not begun by the time work(0) returns is not waited
// for: work must not rely on helpers coming. Safe from several threads at once, and in a child after fork.
void run_on_helpers(int threads, const std::function<void(int rank)>& work);

// A meeting point for a fixed number of threads, for waits of microseconds.
class Barrier {
 public:
  void set_size(int size) { size_ = size; }
  void wait();

 private:
  int size_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

// Waits a moment in a spinning loop; gives the processor away after a while.
class Backoff {
 public:
  void pause();
  int count() const { return count_; }

 private:
  int count_ = 0;
};

}  // namespace fastcascade
