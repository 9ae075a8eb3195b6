// A cascade ready to run: one network per stage, and the selectors between them.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "exit_head.h"
#include "network.h"

namespace fastcascade {

struct CascadeSpec {
  std::vector<StageSpec> stages;
  std::vector<Selector> selectors;  // one per stage, Score::none at the last
  int64_t classes = 0;
  std::vector<float> stage_weights;  // of the mean over stages, positive; empty where each exit answers alone
  int threads = 1;
  bool in_bf16 = false;       // direct convolutions and linear layers, where the machine can
  std::string isa;            // "" for FASTCASCADE_ISA or the best
  std::string forced_kernel;  // as in choose_conv_kernel
};

struct Program {
  static constexpr int64_t kTilesPerWindow = 16;  // of a thread
  static constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

  const KernelTable* kernels;
  std::vector<Network> networks;
  std::vector<Selector> selectors;
  int64_t classes, threads;
  std::vector<float> stage_weights;
  int64_t max_tile;  // instances

  bool saves_features() const;
  // The shape of the features that a stage saves for the next; all zero where it saves none.
  Shape features_shape(size_t stage) const;
  // Instances that a team takes through the first stage before it goes on to the next. Where survivors have features,
  // the memory for them sets the limit, and larger batches go depth first.
  int64_t window_instances() const { return (saves_features() ? 1 : kTilesPerWindow) * threads * max_tile; }
  int64_t team_instances() const { return saves_features() ? window_instances() : kUnlimited; }
  // Instances that can be in a stage's queue in a window: less than a tile per thread has waited for each stage before.
  int64_t queue_instances() const {
    return window_instances() + static_cast<int64_t>(networks.size()) * threads * max_tile;
  }
  // Rows of features that can be in use between two stages: a tile being read and one being written by every thread,
  // and less than a tile that waits.
  int64_t feature_slots(int64_t with_threads) const { return (2 * with_threads + 1) * max_tile; }
  // Buffers of one call, without the tables that grow with the batch.
  int64_t buffer_bytes(int64_t with_threads) const;
  // Results of a batch, and the tables that grow with it.
  int64_t batch_bytes(int64_t instances) const;
};

// Throws std::invalid_argument where the stages, selectors and weights do not fit together, and OutOfMemory where the
// machine has no room for the buffers of a call.
Program build_program(const CascadeSpec& spec);

}  // namespace fastcascade
