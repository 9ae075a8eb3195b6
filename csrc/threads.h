// A process-wide pool of helper threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fastcascade {

// work(rank, helpers): `helpers` is how many other threads may take part, 0 to threads − 1.
using TeamWork = std::function<void(int rank, int helpers)>;

// Calls work on this thread with rank 0 and on up to threads − 1 helpers with ranks 1, 2, …; returns when every call
// that began has ended. Helpers that the system cannot start are done without. A helper that has not begun when rank 0
// returns is not waited for, so work must be complete with rank 0 alone. Only rank 0 may throw. Safe from several
// threads at once, and in a child process after fork.
void run_on_helpers(int threads, const TeamWork& work);

// Tells the processor that this thread spins.
void spin_once();

// One iteration of a spin loop; yields the processor every 64.
class Backoff {
 public:
  void pause();
  int count() const { return count_; }

 private:
  int count_ = 0;
};

}  // namespace fastcascade
