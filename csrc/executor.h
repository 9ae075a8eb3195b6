// Running a cascade of networks on batches, depth first: a tile of instances goes through a whole stage while
// it is in cache; what survives the exit waits in a pool until the next stage has a tile of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "exit_head.h"
#include "network.h"
#include "steps.h"

namespace fastcascade {

struct CascadeSpec {
  std::vector<StageSpec> stages;
  std::vector<Selector> selectors;  // one per stage, Score::none at the last
  int64_t classes = 0;
  std::vector<float> stage_weights;  // positive, one per stage, of the mean of the stages; empty: the last alone
  int threads = 1;
  std::string isa;            // "" for FASTCASCADE_ISA or the best
  std::string forced_kernel;  // "" for the table's choice
};

// A batch of images; strides in elements. `table` is [channels][256], for bytes only.
struct Images {
  const void* data;
  bool bytes;
  const float* table;
  int64_t count;
  int64_t strides[4];
};

Source image_source(const Images& images, const int64_t* rows);

struct Results {
  float* log_probs;  // [count][classes]
  int64_t* label;
  int64_t* exit_stage;
};

struct Context;  // buffers of one call

class Executor {
 public:
  explicit Executor(const CascadeSpec& spec);
  ~Executor();

  // Safe from several threads at once.
  void run(const Images& images, const float* thresholds, const Results& results) const;

  // One stage alone on dense rows: images, or `features` rows [count][c][h][w] of the stage before. Writes
  // logits [count][classes] and, where not null, the stage's own features.
  void run_stage(int64_t stage, const Images& input, float* logits, float* features) const;

  const std::vector<Network>& networks() const { return networks_; }
  const KernelTable& kernels() const { return *kernels_; }
  int64_t classes() const { return classes_; }
  int threads() const { return static_cast<int>(threads_); }
  Shape features_shape(int64_t stage) const;
  int64_t memory_bytes() const;  // of one call, without the per-row tables

 private:
  const KernelTable* kernels_;
  std::vector<Network> networks_;
  std::vector<Selector> selectors_;
  int64_t classes_, threads_, tile_;
  std::vector<float> stage_weights_;
  // Contexts that no call uses. Exchanged atomically, without a lock that a fork could leave locked.
  static constexpr int kSpare = 8;
  mutable std::atomic<Context*> spare_[kSpare] = {};

  friend struct Context;
  friend class Run;
  std::unique_ptr<Context> take_context(int64_t count) const;
  void give_back(std::unique_ptr<Context> context) const;
};

}  // namespace fastcascade
