#include "depth_first_schedule.h"

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <mutex>

#include "run_step.h"
#include "threads.h"

namespace fastcascade {
namespace {

constexpr int64_t kMinTile = 4;  // the end of a batch is divided into tiles no smaller than this

class DepthFirstSchedule {
 public:
  explicit DepthFirstSchedule(const CascadeRun& run) : run_(run) {}

  void run() {
    const auto work = [this](int rank, int) { run_tiles(static_cast<size_t>(rank)); };
    run_on_helpers(static_cast<int>(run_.program.threads), std::ref(work));
  }

 private:
  const CascadeRun& run_;
  // The mutex guards what follows, and the queues and free slots of the context.
  std::mutex mutex_;
  std::condition_variable tile_done_;
  int64_t next_instance_ = 0;
  int running_tiles_ = 0;

  const Network& network(size_t stage) const { return run_.program.networks[stage]; }
  InstanceQueue& queue(size_t stage) const { return run_.context.queues[stage]; }

  // One thread: runs tiles until the batch is done.
  void run_tiles(size_t rank) {
    InstanceQueue& tile = run_.context.tiles[rank];
    ThreadBuffers& buffers = run_.context.buffers[rank];
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const size_t stage = take_tile(tile);
      if (stage == run_.stages()) {
        if (running_tiles_ == 0) return;
        tile_done_.wait(lock);
        continue;
      }
      ++running_tiles_;
      lock.unlock();
      run_steps(network(stage), run_.source(stage, tile.instances.data(), tile.slots.data()), buffers.arena.data(),
                buffers.scratch.data(), tile.size());
      lock.lock();
      free_slots(stage, tile);
      lock.unlock();
      run_exits(stage, tile, buffers);
      lock.lock();
      --running_tiles_;
      tile_done_.notify_all();
    }
  }

  // Takes the deepest full tile, else new images, else what is left at the shallowest stage, because its survivors
  // fill the queues behind it. Returns the stage, or the number of stages if nothing can run now.
  size_t take_tile(InstanceQueue& tile) {
    tile.clear();
    for (size_t stage = run_.stages() - 1; stage > 0; --stage)
      if (queue(stage).size() >= network(stage).tile_instances)
        return take_queued(stage, network(stage).tile_instances, tile);
    const int64_t left = run_.images.count - next_instance_;
    if (left > 0) {
      const int64_t count = balanced_share(left, network(0).tile_instances);
      for (int64_t i = 0; i < count; ++i) tile.push(next_instance_++, 0);
      return 0;
    }
    for (size_t stage = 1; stage < run_.stages(); ++stage)
      if (const int64_t size = queue(stage).size()) return take_queued(stage, balanced_share(size, size), tile);
    return run_.stages();
  }

  // A thread's share of the `left` instances, at most `limit`, so that all threads finish together.
  int64_t balanced_share(int64_t left, int64_t limit) const {
    const int64_t share = (left + run_.program.threads - 1) / run_.program.threads;
    return std::min({limit, left, std::max(share, kMinTile)});
  }

  size_t take_queued(size_t stage, int64_t count, InstanceQueue& tile) {
    InstanceQueue& from = queue(stage);
    for (int64_t i = 0; i < count; ++i) {
      tile.push(from.instances.back(), from.slots.back());
      from.instances.pop_back();
      from.slots.pop_back();
    }
    return stage;
  }

  // The features that a tile has read may be overwritten.
  void free_slots(size_t stage, const InstanceQueue& tile) {
    if (!network(stage).reads_previous()) return;
    std::vector<int64_t>& free = run_.context.free_slots[stage - 1];
    free.insert(free.end(), tile.slots.begin(), tile.slots.end());
  }

  // Evaluates the exit for a tile and queues the survivors for the next stage.
  void run_exits(size_t stage, const InstanceQueue& tile, ThreadBuffers& buffers) {
    const float* arena = buffers.arena.data();
    for (int64_t i = 0; i < tile.size(); ++i) {
      const int64_t instance = tile.instances[static_cast<size_t>(i)];
      if (!run_.survives_exit(stage, arena, i, instance, buffers.exit_head)) continue;
      int64_t slot = 0;
      if (network(stage).features >= 0) {
        slot = take_slot(stage);
        run_.save_features(stage, arena, i, slot);
      }
      std::lock_guard<std::mutex> lock(mutex_);
      queue(stage + 1).push(instance, slot);
    }
  }

  int64_t take_slot(size_t stage) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t>& free = run_.context.free_slots[stage];
    const int64_t slot = free.back();
    free.pop_back();
    return slot;
  }
};

}  // namespace

void run_depth_first_schedule(const CascadeRun& run) { DepthFirstSchedule(run).run(); }

}  // namespace fastcascade
