#include "executor.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "threads.h"

namespace fastcascade {
namespace {

constexpr int kJoinSpins = 8000;      // how long eight images wait for helpers, some 200 µs
constexpr int64_t kSmallestTile = 4;  // what is left of a large batch is shared out in tiles no smaller

// One thread's buffers.
struct Worker {
  Buffer arena, scratch, head;
};

// Rows that wait for a stage: their place in the batch, and in the features kept for it.
struct Waiting {
  std::vector<int64_t> rows, slots;

  void reserve(int64_t count) {
    rows.reserve(static_cast<size_t>(count));
    slots.reserve(static_cast<size_t>(count));
  }
  void clear() {
    rows.clear();
    slots.clear();
  }
  void push(int64_t row, int64_t slot) {
    rows.push_back(row);
    slots.push_back(slot);
  }
  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// Runs all steps of a network on up to a tile of rows; several threads with a barrier share every step.
void run_network(const Network& net, const Source& source, float* arena, float* scratch, int64_t instances, Share share,
                 Barrier* barrier) {
  run_steps(net, source, arena, scratch, instances, share, [&](size_t) {
    if (barrier) barrier->wait();
  });
}

const float* value_row(const Network& net, int64_t value, const float* arena, int64_t instance) {
  return arena + net.values[value].offset + instance * net.values[value].floats;
}

// Writes a row of a value, stored pixel by pixel, as (C, H, W).
void copy_out(const Value& v, const float* from, float* to) {
  const int64_t area = v.shape.h * v.shape.w;
  for (int64_t p = 0; p < area; ++p)
    for (int64_t c = 0; c < v.shape.c; ++c) to[c * area + p] = from[p * v.pitch + c];
}

}  // namespace

Source image_source(const Images& images, const int64_t* rows) {
  Source source;
  source.images = images.data;
  source.bytes = images.bytes;
  source.table = images.table;
  std::copy_n(images.strides, 4, source.strides);
  source.rows = rows;
  return source;
}

// Everything that one call needs; kept and used again by later calls.
struct Context {
  std::vector<Worker> workers;
  std::vector<float> log_sum, weight_sum;
  std::vector<int32_t> previous_label;
  std::vector<uint8_t> keep;
  std::vector<Waiting> waiting;                  // per stage
  std::vector<Waiting> taken;                    // per thread: the tile it runs
  std::vector<Buffer> features;                  // per stage that hands features on
  std::vector<std::vector<int64_t>> free_slots;  // of those

  explicit Context(const Executor& e) : workers(e.threads_), waiting(e.networks_.size()), taken(e.threads_) {
    int64_t arena = 0, scratch = 0;
    for (const Network& net : e.networks_) {
      arena = std::max(arena, net.arena_floats);
      scratch = std::max(scratch, net.scratch_floats);
    }
    for (Worker& w : workers) {
      w.arena = Buffer(arena);
      w.scratch = Buffer(scratch);
      w.head = Buffer(3 * e.classes_ + 8);
    }
    const int64_t tile = e.tile_, slots = slot_count(e);
    for (Waiting& t : taken) t.reserve(tile);
    keep.resize(static_cast<size_t>(slots));
    free_slots.resize(e.networks_.size());
    for (size_t k = 0; k < e.networks_.size(); ++k) {
      const Network& net = e.networks_[k];
      features.emplace_back(net.features < 0 ? 0 : slots * net.values[net.features].floats);
      free_slots[k].reserve(static_cast<size_t>(slots));
    }
  }

  // Rows of features that can be alive at once between two stages: just written or being read by every
  // thread, and fewer than a tile that wait.
  static int64_t slot_count(const Executor& e) { return (2 * e.threads_ + 1) * e.tile_; }

  void start(const Executor& e, int64_t count) {
    const auto n = static_cast<size_t>(count);
    if (!e.stage_weights_.empty()) {
      log_sum.assign(n * static_cast<size_t>(e.classes_), -std::numeric_limits<float>::infinity());
      weight_sum.assign(n, 0.f);
    }
    previous_label.assign(n, -1);
    for (Waiting& w : waiting) {
      w.clear();
      w.reserve(count);
    }
    for (auto& slots : free_slots) {
      slots.clear();
      for (int64_t s = 0; s < slot_count(e); ++s) slots.push_back(s);
    }
  }
};

// One call of Executor::run.
class Run {
 public:
  Run(const Executor& e, Context& context, const Images& images, const float* thresholds, const Results& results)
      : e_(e), context_(context), images_(images), thresholds_(thresholds), stages_(e.networks_.size()) {
    tables_ = {context.log_sum.data(), context.weight_sum.data(), context.previous_label.data(), results.log_probs,
               results.label,          results.exit_stage};
  }

  void run() {
    if (images_.count <= e_.threads_ * e_.tile_)
      run_small();
    else
      run_large();
  }

 private:
  const Executor& e_;
  Context& context_;
  const Images& images_;
  const float* thresholds_;
  const size_t stages_;
  ExitTables tables_;

  Source source(size_t stage, const int64_t* rows, const int64_t* slots) const {
    if (!e_.networks_[stage].reads_previous) return image_source(images_, rows);
    const Network& before = e_.networks_[stage - 1];
    Source s;
    s.features = context_.features[stage - 1].data();
    s.feature_floats = before.values[before.features].floats;
    s.rows = slots;
    return s;
  }

  // The exit head on one row of a tile; true where the row goes on.
  bool leave(size_t stage, const Worker& owner, Worker& self, int64_t instance, int64_t row) const {
    const Network& net = e_.networks_[stage];
    const float threshold = stage + 1 < stages_ ? thresholds_[stage] : 0.f;
    const float weight = e_.stage_weights_.empty() ? 0.f : e_.stage_weights_[stage];
    return exit_row(tables_, value_row(net, net.logits, owner.arena.data(), instance), row, static_cast<int64_t>(stage),
                    e_.classes_, weight, e_.selectors_[stage], threshold, self.head.data());
  }

  void keep_features(size_t stage, const Worker& owner, int64_t instance, int64_t slot) const {
    const Network& net = e_.networks_[stage];
    if (net.features < 0) return;
    const int64_t floats = net.values[net.features].floats;
    std::copy_n(value_row(net, net.features, owner.arena.data(), instance), floats,
                context_.features[stage].data() + slot * floats);
  }

  // -- small batches: all threads run the same stage, each on its own rows; they share step by step what does
  // -- not divide among them, and everything where rows are too few ------------------------------------------

  struct Small {
    std::atomic<int> joined{0};  // helpers; −1 once the team is closed
    Barrier barrier;
    int64_t size = 1;
    int64_t active = 0;
  };

  void run_small() {
    Small team;
    Waiting& active = context_.waiting[0];
    for (int64_t row = 0; row < images_.count; ++row) active.push(row, row);
    team.active = images_.count;
    std::atomic<bool> open{false};
    const auto work = [&](int rank) {
      const int64_t member = rank == 0 ? gather(team, open) : join(team, open);
      if (member >= 0) run_member(team, member);
    };
    run_on_helpers(static_cast<int>(e_.threads_), std::ref(work));  // a copy would be allocated
  }

  // Waits for helpers, the longer the more there is to do, then closes the team to those who come later.
  int64_t gather(Small& team, std::atomic<bool>& open) const {
    const int64_t patience = kJoinSpins * std::max<int64_t>(1, images_.count / 8);
    Backoff backoff;
    while (team.joined.load() < e_.threads_ - 1 && backoff.count() < patience) backoff.pause();
    team.size = 1 + team.joined.exchange(-1);
    team.barrier.set_size(static_cast<int>(team.size));
    open.store(true);
    return 0;
  }

  static int64_t join(Small& team, const std::atomic<bool>& open) {
    int before = team.joined.load();
    do {
      if (before < 0) return -1;
    } while (!team.joined.compare_exchange_weak(before, before + 1));
    Backoff backoff;
    while (!open.load()) backoff.pause();
    return before + 1;
  }

  void run_member(Small& team, int64_t member) const {
    Worker& self = context_.workers[static_cast<size_t>(member)];
    for (size_t stage = 0; stage < stages_ && team.active > 0; ++stage) {
      const int64_t even = team.active / team.size, each = even < e_.networks_[stage].rows_alone ? 0 : even;
      const int64_t shared = each * team.size;
      for (int64_t first = member * each; first < (member + 1) * each; first += e_.networks_[stage].tile)
        run_rows(stage, self, self, first, std::min(e_.networks_[stage].tile, (member + 1) * each - first), {},
                 nullptr);
      if (shared < team.active) run_shared(team, stage, member, shared);
      team.barrier.wait();
      if (member == 0) compact(team, stage);
      team.barrier.wait();
    }
  }

  // Runs rows at positions [first, first + count) of the active list in `owner`'s arena.
  void run_rows(size_t stage, Worker& owner, Worker& self, int64_t first, int64_t count, Share share,
                Barrier* barrier) const {
    const Network& net = e_.networks_[stage];
    const Waiting& active = context_.waiting[stage];
    run_network(net, source(stage, active.rows.data() + first, active.slots.data() + first), owner.arena.data(),
                self.scratch.data(), count, share, barrier);
    if (share.rank != 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = first + i;
      const bool stays = leave(stage, owner, self, i, active.rows[static_cast<size_t>(position)]);
      context_.keep[static_cast<size_t>(position)] = stays;
      if (stays) keep_features(stage, owner, i, position);
    }
  }

  void run_shared(Small& team, size_t stage, int64_t member, int64_t first) const {
    team.barrier.wait();  // until the owner of the arena has finished its own rows
    Worker& self = context_.workers[static_cast<size_t>(member)];
    const int64_t tile = e_.networks_[stage].tile;
    for (; first < team.active; first += tile) {
      run_rows(stage, context_.workers[0], self, first, std::min(tile, team.active - first), {member, team.size},
               &team.barrier);
      team.barrier.wait();
    }
  }

  void compact(Small& team, size_t stage) const {
    const Waiting& active = context_.waiting[stage];
    team.active = 0;
    if (stage + 1 == stages_) return;
    Waiting& next = context_.waiting[stage + 1];
    for (int64_t i = 0; i < active.size(); ++i)
      if (context_.keep[static_cast<size_t>(i)]) next.push(active.rows[static_cast<size_t>(i)], i);
    team.active = next.size();
  }

  // -- large batches: threads take tiles; no barrier between stages ------------------------------------------

  struct Large {
    std::mutex mutex;
    std::condition_variable changed;
    int64_t next_row = 0;
    int running = 0;
  };

  void run_large() {
    Large shared;
    run_on_helpers(static_cast<int>(e_.threads_), [&](int rank) { run_tiles(shared, static_cast<size_t>(rank)); });
  }

  void run_tiles(Large& shared, size_t rank) const {
    Waiting& mine = context_.taken[rank];
    Worker& self = context_.workers[rank];
    std::unique_lock<std::mutex> lock(shared.mutex);
    for (;;) {
      const size_t stage = take_tile(shared, mine);
      if (stage == stages_) {
        if (shared.running == 0) return;
        shared.changed.wait(lock);
        continue;
      }
      ++shared.running;
      lock.unlock();
      const Network& net = e_.networks_[stage];
      run_network(net, source(stage, mine.rows.data(), mine.slots.data()), self.arena.data(), self.scratch.data(),
                  mine.size(), {}, nullptr);
      lock.lock();
      release(stage, mine);
      lock.unlock();
      hand_on(shared, stage, self, mine);
      lock.lock();
      --shared.running;
      shared.changed.notify_all();
    }
  }

  // Picks the deepest stage that has a full tile, then fresh images, then what is left over, shallowest first
  // because that feeds the deeper ones. Returns the number of stages where there is nothing to do now.
  size_t take_tile(Large& shared, Waiting& mine) const {
    for (size_t stage = stages_ - 1; stage > 0; --stage)
      if (context_.waiting[stage].size() >= e_.networks_[stage].tile)
        return take_waiting(stage, e_.networks_[stage].tile, mine);
    const int64_t left = images_.count - shared.next_row;
    if (left > 0) {
      mine.clear();
      const int64_t count = fair(left, e_.networks_[0].tile);
      for (int64_t i = 0; i < count; ++i) mine.push(shared.next_row++, 0);
      return 0;
    }
    for (size_t stage = 1; stage < stages_; ++stage)
      if (const int64_t size = context_.waiting[stage].size()) return take_waiting(stage, fair(size, size), mine);
    return stages_;
  }

  // A thread's share of `left` rows, so that all threads end together.
  int64_t fair(int64_t left, int64_t tile) const {
    const int64_t share = (left + e_.threads_ - 1) / e_.threads_;
    return std::min({tile, left, std::max(share, kSmallestTile)});
  }

  size_t take_waiting(size_t stage, int64_t count, Waiting& mine) const {
    Waiting& from = context_.waiting[stage];
    mine.clear();
    for (int64_t i = 0; i < count; ++i) {
      mine.push(from.rows.back(), from.slots.back());
      from.rows.pop_back();
      from.slots.pop_back();
    }
    return stage;
  }

  // The features that a tile has read may be overwritten.
  void release(size_t stage, const Waiting& tile) const {
    if (!e_.networks_[stage].reads_previous) return;
    for (int64_t slot : tile.slots) context_.free_slots[stage - 1].push_back(slot);
  }

  void hand_on(Large& shared, size_t stage, Worker& self, const Waiting& tile) const {
    for (int64_t i = 0; i < tile.size(); ++i) {
      const int64_t row = tile.rows[static_cast<size_t>(i)];
      if (!leave(stage, self, self, i, row)) continue;
      int64_t slot = 0;
      if (e_.networks_[stage].features >= 0) {
        std::unique_lock<std::mutex> lock(shared.mutex);
        slot = context_.free_slots[stage].back();
        context_.free_slots[stage].pop_back();
        lock.unlock();
        keep_features(stage, self, i, slot);
      }
      std::lock_guard<std::mutex> lock(shared.mutex);
      context_.waiting[stage + 1].push(row, slot);
    }
  }
};

namespace {

void check_selector(const Selector& s, size_t stage, bool last, int64_t classes) {
  const std::string where = "selector " + std::to_string(stage);
  if (last != (s.score == Score::none))
    throw std::invalid_argument(where + (last ? ": the last stage has none" : " is missing"));
  const bool is_mlp = s.score == Score::mlp_stats || s.score == Score::mlp_topk || s.score == Score::mlp_probs;
  if (classes < 2 && !last) throw std::invalid_argument(where + ": a selector needs at least 2 classes");
  if (s.score == Score::mlp_topk && classes < 3)
    throw std::invalid_argument(where + ": features 'topk' need at least 3 classes");
  if (!is_mlp) return;
  const int64_t expected = s.score == Score::mlp_probs ? classes : 4;
  const auto size = [](const std::vector<float>& v) { return static_cast<int64_t>(v.size()); };
  if (s.features != expected || size(s.mean) != expected || size(s.std) != expected || s.hidden < 1 ||
      size(s.b1) != s.hidden || size(s.w2) != s.hidden || size(s.w1) / s.hidden != expected ||
      size(s.w1) % s.hidden != 0)
    throw std::invalid_argument(where + ": weights do not fit " + std::to_string(expected) + " features and " +
                                std::to_string(s.hidden) + " hidden units");
}

}  // namespace

Executor::Executor(const CascadeSpec& spec)
    : kernels_(&choose_isa(spec.isa)),
      selectors_(spec.selectors),
      classes_(spec.classes),
      threads_(spec.threads),
      tile_(1),
      stage_weights_(spec.stage_weights) {
  if (spec.stages.empty() || spec.stages.size() != spec.selectors.size())
    throw std::invalid_argument("expected at least one stage and a selector entry for each");
  if (!stage_weights_.empty() && stage_weights_.size() != spec.stages.size())
    throw std::invalid_argument(std::to_string(stage_weights_.size()) + " stage weights for " +
                                std::to_string(spec.stages.size()) + " stages");
  for (const float weight : stage_weights_)
    if (!(weight > 0.f) || std::isinf(weight))
      throw std::invalid_argument("a stage weight is " + std::to_string(weight) + ", expected a positive number");
  if (spec.threads < 1 || spec.threads > 1024)
    throw std::invalid_argument("threads is " + std::to_string(spec.threads) + ", expected 1 to 1024");
  for (size_t k = 0; k < spec.stages.size(); ++k) {
    const bool last = k + 1 == spec.stages.size();
    const StageSpec& stage = spec.stages[k];
    check_selector(spec.selectors[k], k, last, spec.classes);
    if (stage.reads_previous && k == 0) throw std::invalid_argument("the first stage cannot read a previous one");
    if (stage.reads_previous && !(stage.input == features_shape(static_cast<int64_t>(k) - 1)))
      throw std::invalid_argument("stage '" + stage.name + "' reads features of shape " + stage.input.text() +
                                  ", but the stage before gives " + features_shape(static_cast<int64_t>(k) - 1).text());
    networks_.push_back(build_network(stage, *kernels_, spec.forced_kernel));
    const Shape& logits = networks_[k].values[networks_[k].logits].shape;
    if (!(logits == Shape{spec.classes, 1, 1}))
      throw std::invalid_argument("stage '" + stage.name + "' ends in logits of shape " + logits.text() +
                                  ", expected " + std::to_string(spec.classes) + " classes");
    tile_ = std::max(tile_, networks_[k].tile);
  }
}

Executor::~Executor() {
  for (auto& spare : spare_) delete spare.load();
}

Shape Executor::features_shape(int64_t stage) const {
  const Network& net = networks_[static_cast<size_t>(stage)];
  return net.features < 0 ? Shape{0, 0, 0} : net.values[net.features].shape;
}

int64_t Executor::memory_bytes() const {
  int64_t arena = 0, scratch = 0, features = 0;
  for (const Network& net : networks_) {
    arena = std::max(arena, net.arena_floats);
    scratch = std::max(scratch, net.scratch_floats);
    if (net.features >= 0) features += Context::slot_count(*this) * net.values[net.features].floats;
  }
  return 4 * (threads_ * (arena + scratch) + features);
}

std::unique_ptr<Context> Executor::take_context(int64_t count) const {
  std::unique_ptr<Context> context;
  for (auto& spare : spare_)
    if (!context) context.reset(spare.exchange(nullptr));
  if (!context) context = std::make_unique<Context>(*this);
  context->start(*this, count);
  return context;
}

void Executor::give_back(std::unique_ptr<Context> context) const {
  for (auto& spare : spare_) {
    Context* empty = nullptr;
    if (spare.compare_exchange_strong(empty, context.get())) {
      context.release();
      return;
    }
  }
}

void Executor::run(const Images& images, const float* thresholds, const Results& results) const {
  if (images.count == 0) return;
  std::unique_ptr<Context> context = take_context(images.count);
  Run(*this, *context, images, thresholds, results).run();
  give_back(std::move(context));
}

void Executor::run_stage(int64_t stage, const Images& input, float* logits, float* features) const {
  if (input.count == 0) return;
  const Network& net = networks_[static_cast<size_t>(stage)];
  std::unique_ptr<Context> context = take_context(input.count);
  std::atomic<int64_t> next{0};
  Waiting& all = context->waiting[0];
  for (int64_t row = 0; row < input.count; ++row) all.push(row, row);
  const int64_t feature_floats =
      net.features < 0
          ? 0
          : net.values[net.features].shape.c * net.values[net.features].shape.h * net.values[net.features].shape.w;
  const auto work = [&](int rank) {
    Worker& self = context->workers[static_cast<size_t>(rank)];
    for (int64_t first; (first = next.fetch_add(net.tile)) < input.count;) {
      const int64_t count = std::min(net.tile, input.count - first);
      const Source source = image_source(input, all.rows.data() + first);
      run_network(net, source, self.arena.data(), self.scratch.data(), count, {}, nullptr);
      for (int64_t i = 0; i < count; ++i) {
        copy_out(net.values[net.logits], value_row(net, net.logits, self.arena.data(), i),
                 logits + (first + i) * classes_);
        if (features)
          copy_out(net.values[net.features], value_row(net, net.features, self.arena.data(), i),
                   features + (first + i) * feature_floats);
      }
    }
  };
  run_on_helpers(static_cast<int>(threads_), std::ref(work));
  give_back(std::move(context));
}

}  // namespace fastcascade
