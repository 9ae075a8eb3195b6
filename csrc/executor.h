// Running a program on batches.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "program.h"
#include "source.h"

namespace fastcascade {

struct Results {
  float* log_probs;  // [count][classes]
  int64_t* label;
  int64_t* exit_stage;
};

struct RunContext;

class Executor {
 public:
  explicit Executor(const CascadeSpec& spec);
  ~Executor();

  // Safe from several threads at once. Throws OutOfMemory.
  void run(const Images& images, const float* thresholds, const Results& results) const;

  // One stage alone, without its exit, on images or features of the stage's input shape. Writes logits
  // [count][classes] and, where not null, the stage's own features [count][c][h][w]. Throws OutOfMemory.
  void run_stage(size_t stage, const Images& input, float* logits, float* features) const;

  const Program& program() const { return program_; }

 private:
  const Program program_;
  // Contexts that no call uses. They are exchanged atomically, because a fork could leave a lock locked.
  static constexpr int kSpareContexts = 8;
  mutable std::atomic<RunContext*> spare_[kSpareContexts] = {};

  std::unique_ptr<RunContext> take_context(int64_t instances) const;
  void return_context(std::unique_ptr<RunContext> context) const;
};

}  // namespace fastcascade
