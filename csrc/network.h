// A stage as operations (what the plan says) and as steps (what runs): shapes inferred and checked, kernels
// chosen, weights packed for the vector width, values placed in one arena.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastcascade {

// Larger than any real network's values and weights, and than the activations of one instance: 8 GiB. Small
// enough that no product of a plan's sizes overflows 64 bits.
constexpr int64_t kMaxFloats = int64_t{1} << 31;

// Cache-line-aligned floats, zero at first.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats);
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

struct Shape {
  int64_t c = 0, h = 1, w = 1;
  bool operator==(const Shape& o) const { return c == o.c && h == o.h && w == o.w; }
  std::string text() const;
};

enum class OpKind { conv2d, pool, linear, add, activation, scale_shift, slice, pad, concat, flatten };

// One operation of the plan. Fields that its kind does not use keep their defaults; arrays are (C, H, W) or
// (height, width), padding is (top, bottom, left, right).
struct OpSpec {
  OpKind kind = OpKind::activation;
  int64_t output = 0;
  std::vector<int64_t> inputs;
  int64_t residual = -1;
  // The activation as a clamp.
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  std::array<int64_t, 4> weight_shape{};
  std::vector<float> weight, bias;  // scale_shift: scale and shift
  std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, dilation{1, 1};
  std::array<int64_t, 4> padding{};
  int64_t groups = 1;
  bool is_max = false, ceil_mode = false, include_padding = true;
  std::array<int64_t, 3> before{}, after{};               // pad
  std::array<int64_t, 3> start{}, stop{}, step{1, 1, 1};  // slice
  float value = 0.f;                                      // pad
  bool residual_after_clamp = false;                      // set by fusion only
};

struct StageSpec {
  std::string name;
  bool reads_previous = false;
  Shape input;
  std::vector<OpSpec> ops;
  int64_t features = 0, logits = 0;
  bool keeps_features = false;  // the next stage reads them
};

// Where a value lives. A value is held for the whole tile of instances if a later segment reads it, else for
// one sub-tile of its segment.
struct Value {
  Shape shape;
  int64_t pitch = 0;   // channels as stored
  int64_t floats = 0;  // per instance
  bool whole = false;
  int64_t offset = 0;  // in the arena
};

enum class StepKind { load, direct, winograd, depthwise, pool, elementwise, pad, slice, concat, flatten };

struct Step {
  StepKind kind;
  std::vector<int64_t> inputs;
  int64_t output = 0, residual = -1;
  std::string operation, kernel;  // for describe()
  int64_t macs = 0;               // per instance, as the plan defines it, whatever the kernel does
  std::vector<float> bias;
  std::vector<int64_t> taps;
  Buffer weights, plain_weights;  // the second of Winograd convolutions in networks with large weights
  int64_t work = 0;               // pixels or tiles per instance
  int64_t blocks = 1;             // vectors of output channels that may be split
  DirectConv direct{};
  Winograd winograd{};
  DepthwiseConv depthwise{};
  Pool pool{};
  Elementwise elementwise{};
  OpSpec layout;  // pad, slice
};

// Steps that run one sub-tile after the other, so that what they exchange stays in cache.
struct Segment {
  size_t begin, end;  // steps
  int64_t instances;  // of a sub-tile
};

struct Network {
  std::string name;
  const KernelTable* kernels;
  bool reads_previous;
  std::vector<Value> values;
  std::vector<Step> steps;  // the first loads value 0
  std::vector<Segment> segments;
  int64_t features, logits;  // values; features is -1 where no later stage reads them
  int64_t tile;              // instances that run together
  int64_t rows_alone;        // with fewer a thread, threads share every step instead of each running its own rows
  int64_t arena_floats;      // activations of a tile
  int64_t scratch_floats;    // of one thread
  int64_t weight_bytes;
  Buffer zeros;
};

// Checks a stage and prepares it. `forced` names a kernel for every convolution that can use it ("" for the
// table's choice). Throws std::invalid_argument where the plan is inconsistent.
Network build_network(const StageSpec& spec, const KernelTable& kernels, const std::string& forced);

}  // namespace fastcascade
