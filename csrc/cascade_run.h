// One call of a program: what both schedules do with a tile.
#pragma once

#include "executor.h"
#include "run_context.h"

namespace fastcascade {

// One instance of a value that has room for the whole tile.
inline const float* value_of_instance(const Network& net, int64_t value, const float* arena, int64_t instance) {
  return arena + net.values[value].offset + instance * net.values[value].floats;
}

class CascadeRun {
 public:
  const Program& program;
  RunContext& context;
  const Images& images;

  CascadeRun(const Program& program, RunContext& context, const Images& images, const float* thresholds,
             const Results& results);

  size_t stages() const { return program.networks.size(); }

  // What a stage reads for instances of the batch whose features are in `slots`.
  Source source(size_t stage, const int64_t* instances, const int64_t* slots) const;

  // Evaluates the exit of a stage for an instance of the batch, whose logits are at `position` of the tile in `arena`.
  // Retires it if it stops. `work` is the calling thread's exit_head buffer.
  bool survives_exit(size_t stage, const float* arena, int64_t position, int64_t instance, Buffer& work) const;

  // Saves the features at `position` of the tile for the next stage, if that reads them.
  void save_features(size_t stage, const float* arena, int64_t position, int64_t slot) const;

 private:
  const float* thresholds_;
  ExitTables tables_;
};

}  // namespace fastcascade
