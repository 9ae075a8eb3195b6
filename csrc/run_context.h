// Buffers and tables of one call. A context is kept and used again, so that warm calls allocate nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"
#include "team.h"

namespace fastcascade {

struct ThreadBuffers {
  Buffer arena, scratch, exit_head;
};

// Instances that wait for a stage: their index in the batch, and the slot of their features.
struct InstanceQueue {
  std::vector<int64_t> instances, slots;

  void reserve(int64_t count) {
    instances.reserve(static_cast<size_t>(count));
    slots.reserve(static_cast<size_t>(count));
  }
  void clear() {
    instances.clear();
    slots.clear();
  }
  void push(int64_t instance, int64_t slot) {
    instances.push_back(instance);
    slots.push_back(slot);
  }
  void erase_first(int64_t count) {
    instances.erase(instances.begin(), instances.begin() + count);
    slots.erase(slots.begin(), slots.begin() + count);
  }
  int64_t size() const { return static_cast<int64_t>(instances.size()); }
};

struct RunContext {
  std::vector<ThreadBuffers> buffers;  // per thread
  Team team;
  std::vector<InstanceQueue> tiles;              // per thread: the tile that it runs
  std::vector<InstanceQueue> queues;             // per stage
  std::vector<Buffer> features;                  // per stage that saves features: [slot][floats]
  std::vector<std::vector<int64_t>> free_slots;  // per stage that saves features
  std::vector<uint8_t> survives;                 // per instance of the queue that a team runs
  // Tables of the exit head, per instance of the batch.
  std::vector<float> log_sum, weight_sum;
  std::vector<int32_t> previous_label;

  explicit RunContext(const Program& program);
  // Makes room for a batch and clears what the call before has left.
  void start_batch(const Program& program, int64_t instances);
};

}  // namespace fastcascade
