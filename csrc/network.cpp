#include "network.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "choices.h"
#include "pack.h"
#include "shapes.h"

namespace fastcascade {
namespace {

// A sub-tile's inputs and outputs should share the second-level cache with the weights.
constexpr int64_t kSubTileBytes = 384 << 10;
constexpr int64_t kArenaBytes = 4 << 20;
constexpr int64_t kMaxTile = 16;
// Where an instance uses a weight less often than this on average, a few instances take as long as the weights
// take to arrive: better all threads read them once than each of them all.
constexpr int64_t kFewUses = 5;
constexpr int64_t kFewRows = 5;
// Weights beyond this do not stay in the last cache from one small batch to the next.
constexpr double kNearBytes = 16 << 20;

class Builder {
 public:
  Builder(const StageSpec& spec, const KernelTable& kernels, const std::string& forced)
      : spec_(spec), ops_(spec.ops), kernels_(kernels), forced_(forced) {
    net_.name = spec.name;
    net_.kernels = &kernels;
    net_.reads_previous = spec.reads_previous;
    net_.features = spec.keeps_features ? spec.features : -1;
    net_.logits = spec.logits;
  }

  Network build() {
    const std::vector<Shape> shapes = infer_shapes(spec_);
    for (const Shape& s : shapes) add_value(s);
    fuse_adds();
    if (!spec_.reads_previous && image_feeds_direct_only()) set_pitch(net_.values[0], net_.values[0].shape.c);
    add_load();
    for (const OpSpec& op : ops_) add_op(op);
    place_values();
    measure();
    return std::move(net_);
  }

 private:
  const StageSpec& spec_;
  std::vector<OpSpec> ops_;
  const KernelTable& kernels_;
  const std::string forced_;
  Network net_;

  void set_pitch(Value& v, int64_t pitch) {
    v.pitch = pitch;
    v.floats = v.shape.h * v.shape.w * pitch;
  }

  int64_t add_value(const Shape& s) {
    Value v;
    v.shape = s;
    set_pitch(v, round_up(s.c, kernels_.lanes));
    net_.values.push_back(v);
    return static_cast<int64_t>(net_.values.size()) - 1;
  }

  const Shape& shape(int64_t v) const { return net_.values[v].shape; }

  // -- choice and fusion ------------------------------------------------------------------------------------

  bool is_depthwise(const OpSpec& op) const {
    return op.kind == OpKind::conv2d && op.groups > 1 && op.groups == op.weight_shape[0] && op.weight_shape[1] == 1 &&
           shape(op.inputs[0]).c == op.groups && forced_ != "conv_direct_f32";
  }

  bool can_winograd(const OpSpec& op) const {
    const std::array<int64_t, 2> one{1, 1}, three{3, 3};
    return op.kernel == three && op.stride == one && op.dilation == one && op.groups == 1 &&
           *std::max_element(op.padding.begin(), op.padding.end()) <= 1;
  }

  bool is_winograd(const OpSpec& op) const {
    if (op.kind != OpKind::conv2d || !can_winograd(op)) return false;
    if (!forced_.empty()) return forced_ == "conv3x3_winograd_f32";
    const Shape& out = shape(op.output);
    return prefers_winograd(kernels_.isa, op.weight_shape[1], out.c, out.h, out.w);
  }

  bool is_direct(const OpSpec& op) const { return op.kind == OpKind::conv2d && !is_depthwise(op) && !is_winograd(op); }

  bool image_feeds_direct_only() const {
    for (const OpSpec& op : ops_) {
      const bool reads = std::count(op.inputs.begin(), op.inputs.end(), 0) > 0 || op.residual == 0;
      if (reads && (!is_direct(op) || op.residual == 0)) return false;
    }
    return net_.features != 0 && spec_.logits != 0;
  }

  int64_t count_reads(int64_t value) const {
    int64_t reads = (value == net_.features) + (value == spec_.logits);
    for (const OpSpec& op : ops_)
      reads += std::count(op.inputs.begin(), op.inputs.end(), value) + (op.residual == value);
    return reads;
  }

  // x + relu(conv(y)) becomes one convolution whose residual comes after the clamp, where nothing else reads the
  // convolution's own result.
  void fuse_adds() {
    for (size_t i = 1; i < ops_.size(); ++i) {
      OpSpec& add = ops_[i];
      OpSpec& conv = ops_[i - 1];
      const bool unclamped =
          add.low == -std::numeric_limits<float>::infinity() && add.high == std::numeric_limits<float>::infinity();
      if (add.kind != OpKind::add || conv.kind != OpKind::conv2d || conv.residual >= 0 || !unclamped) continue;
      if (count_reads(conv.output) != 1 || add.inputs[0] == add.inputs[1]) continue;
      if (add.inputs[0] != conv.output && add.inputs[1] != conv.output) continue;
      conv.residual = add.inputs[add.inputs[0] == conv.output ? 1 : 0];
      conv.residual_after_clamp = true;
      conv.output = add.output;
      ops_.erase(ops_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  // -- steps --------------------------------------------------------------------------------------------------

  Step& add_step(StepKind kind, const OpSpec& op, const std::string& operation, const std::string& kernel) {
    net_.steps.emplace_back();
    Step& step = net_.steps.back();
    const Shape& out = shape(op.output);
    step.kind = kind;
    step.inputs = op.inputs;
    step.output = op.output;
    step.residual = op.residual;
    step.operation = operation + " -> " + out.text();
    step.kernel = kernel;
    step.work = out.h * out.w;
    step.macs = out.c * step.work * op.weight_shape[1] * op.weight_shape[2] * op.weight_shape[3];
    step.layout = OpSpec();
    return step;
  }

  void add_load() {
    OpSpec op;
    op.output = 0;
    add_step(StepKind::load, op, spec_.reads_previous ? "read features" : "read image", "load_f32").work = shape(0).h;
  }

  Epilogue epilogue(Step& step, const OpSpec& op) {
    const Value& out = net_.values[op.output];
    step.bias = op.bias;
    step.bias.resize(out.pitch, 0.f);
    step.blocks = out.pitch / kernels_.lanes;
    return {step.bias.data(), nullptr, op.low, op.high, op.residual_after_clamp};
  }

  void add_op(const OpSpec& op) {
    switch (op.kind) {
      case OpKind::conv2d:
        if (is_winograd(op)) return add_winograd(op);
        return is_depthwise(op) ? add_depthwise(op) : add_direct(op);
      case OpKind::linear: return add_direct(op);
      case OpKind::pool: return add_pool(op);
      case OpKind::add:
      case OpKind::activation:
      case OpKind::scale_shift: return add_elementwise(op);
      case OpKind::slice: return add_layout(StepKind::slice, op, "slice", "slice_f32");
      case OpKind::pad: return add_layout(StepKind::pad, op, "pad", "pad_f32");
      case OpKind::concat: return add_layout(StepKind::concat, op, "concat", "concat_f32");
      case OpKind::flatten: return add_layout(StepKind::flatten, op, "flatten", "flatten_f32");
    }
  }

  void add_layout(StepKind kind, const OpSpec& op, const char* operation, const char* kernel) {
    Step& step = add_step(kind, op, operation, kernel);
    step.layout = op;
    if (kind == StepKind::flatten) step.work = 1;
  }

  static std::string conv_text(const OpSpec& op, const Shape& in, bool has_residual) {
    if (op.kind == OpKind::linear) return "linear " + in.text();
    std::string text = "conv " + std::to_string(op.kernel[0]) + "x" + std::to_string(op.kernel[1]);
    if (op.stride[0] != 1 || op.stride[1] != 1) text += " stride " + std::to_string(op.stride[0]);
    if (op.groups > 1) text += " groups " + std::to_string(op.groups);
    text += " " + in.text();
    if (has_residual) text += " + residual";
    if (op.low == 0.f) text += op.high == 6.f ? " + relu6" : " + relu";
    return text;
  }

  // The input of `op` with its zero padding written out.
  int64_t padded_input(const OpSpec& op) {
    const int64_t in = op.inputs[0];
    if (op.padding == std::array<int64_t, 4>{}) return in;
    OpSpec pad;
    pad.kind = OpKind::pad;
    pad.inputs = {in};
    pad.before = {0, op.padding[0], op.padding[2]};
    pad.after = {0, op.padding[1], op.padding[3]};
    const Shape s = shape(in);
    pad.output = add_value({s.c, s.h + pad.before[1] + pad.after[1], s.w + pad.before[2] + pad.after[2]});
    set_pitch(net_.values[pad.output], net_.values[in].pitch);
    add_layout(StepKind::pad, pad, "pad", "pad_f32");
    return pad.output;
  }

  // Offsets of the kernel's positions, or of its rows, from an output pixel's origin.
  static std::vector<int64_t> tap_offsets(const OpSpec& op, const Value& in, bool join_columns) {
    std::vector<int64_t> taps;
    for (int64_t y = 0; y < op.kernel[0]; ++y)
      for (int64_t x = 0; x < (join_columns ? 1 : op.kernel[1]); ++x)
        taps.push_back((y * op.dilation[0] * in.shape.w + x * op.dilation[1]) * in.pitch);
    return taps;
  }

  void add_direct(OpSpec op) {
    const std::string text = conv_text(op, shape(op.inputs[0]), op.residual >= 0);
    op.inputs[0] = padded_input(op);
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    const DenseWeights dense = merge_groups(op, kernels_.lanes);
    // Neighbouring columns of the kernel read neighbouring floats where pixels have no gaps between them.
    const bool join_columns = dense.groups == 1 && op.dilation[1] == 1 && in.pitch == in.shape.c;
    Step& step = add_step(StepKind::direct, op, text, op.kind == OpKind::linear ? "linear_f32" : "conv_direct_f32");
    step.weights = pack_direct(dense, kernels_);
    step.taps = tap_offsets(op, in, join_columns);
    DirectConv& c = step.direct;
    c.weights = step.weights.data();
    c.tap_offsets = step.taps.data();
    c.taps = static_cast<int64_t>(step.taps.size());
    c.depth = join_columns ? dense.kw * dense.in : dense.in;
    c.image_step = in.floats;
    c.row_step = op.stride[0] * in.shape.w * in.pitch;
    c.pixel_step = op.stride[1] * in.pitch;
    c.height = out.shape.h;
    c.width = out.shape.w;
    c.pitch = out.pitch;
    c.group_channels = dense.in;
    c.epilogue = epilogue(step, op);
    c.blocks_per_group = dense.groups == 1 ? step.blocks : dense.out / dense.groups / kernels_.lanes;
    if (dense.groups > 1) step.blocks = 1;  // one range of blocks, never split
  }

  void add_winograd(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    Step& step = add_step(StepKind::winograd, op, conv_text(op, in.shape, op.residual >= 0), "conv3x3_winograd_f32");
    WinogradWeights packed = pack_winograd(merge_groups(op, kernels_.lanes), kernels_);
    step.weights = std::move(packed.transformed);
    step.plain_weights = std::move(packed.plain);
    step.work = ((out.shape.h + 3) / 4) * ((out.shape.w + 3) / 4);
    Winograd& c = step.winograd;
    c.weights = step.weights.data();
    c.in_height = in.shape.h;
    c.in_width = in.shape.w;
    c.in_pitch = in.pitch;
    c.channels = in.shape.c;
    c.height = out.shape.h;
    c.width = out.shape.w;
    c.pitch = out.pitch;
    c.pad_top = op.padding[0];
    c.pad_left = op.padding[2];
    c.epilogue = epilogue(step, op);
  }

  void add_depthwise(OpSpec op) {
    const std::string text = conv_text(op, shape(op.inputs[0]), op.residual >= 0);
    op.inputs[0] = padded_input(op);
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    Step& step = add_step(StepKind::depthwise, op, text, "conv_depthwise_f32");
    step.weights = pack_depthwise(op, out.pitch);
    step.taps = tap_offsets(op, in, false);
    step.depthwise = {nullptr,
                      nullptr,
                      step.weights.data(),
                      step.taps.data(),
                      static_cast<int64_t>(step.taps.size()),
                      in.floats,
                      op.stride[0] * in.shape.w * in.pitch,
                      op.stride[1] * in.pitch,
                      out.shape.h,
                      out.shape.w,
                      out.pitch,
                      epilogue(step, op)};
    step.blocks = 1;
  }

  void add_pool(const OpSpec& op) {
    const Value in = net_.values[op.inputs[0]], out = net_.values[op.output];
    const std::string window = std::to_string(op.kernel[0]) + "x" + std::to_string(op.kernel[1]);
    Step& step =
        add_step(StepKind::pool, op, (op.is_max ? "max pool " : "average pool ") + window + " " + in.shape.text(),
                 op.is_max ? "pool_max_f32" : "pool_average_f32");
    step.pool = {nullptr,      nullptr,      op.is_max,     op.include_padding, op.kernel[0],  op.kernel[1],
                 op.stride[0], op.stride[1], op.padding[0], op.padding[2],      op.padding[1], op.padding[3],
                 in.shape.h,   in.shape.w,   out.shape.h,   out.shape.w,        out.pitch};
  }

  void add_elementwise(const OpSpec& op) {
    const Value& out = net_.values[op.output];
    const char* name = op.kind == OpKind::add          ? "add"
                       : op.kind == OpKind::activation ? "activation"
                                                       : "scale and shift";
    Step& step = add_step(StepKind::elementwise, op, name, "elementwise_f32");
    Elementwise& c = step.elementwise;
    c.pitch = out.pitch;
    c.low = op.low;
    c.high = op.high;
    if (op.kind != OpKind::scale_shift) return;
    step.weights = Buffer(2 * out.pitch);
    std::copy(op.weight.begin(), op.weight.end(), step.weights.data());
    std::copy(op.bias.begin(), op.bias.end(), step.weights.data() + out.pitch);
    c.scale = step.weights.data();
    c.shift = c.scale + out.pitch;
  }

  // -- schedule and memory --------------------------------------------------------------------------------

  std::vector<int64_t> reads(const Step& step) const {
    std::vector<int64_t> values = step.inputs;
    if (step.residual >= 0) values.push_back(step.residual);
    return values;
  }

  int64_t sub_tile(const Step& step) const {
    int64_t floats = net_.values[step.output].floats;
    for (int64_t v : reads(step)) floats += net_.values[v].floats;
    // Weights that stream past the cache are worth more room for the instances that share one reading.
    const int64_t bytes = 4 * step.weights.size() > kSubTileBytes ? 2 * kSubTileBytes : kSubTileBytes;
    int64_t instances = 1;
    while (2 * instances <= net_.tile && 2 * instances * floats * 4 <= bytes) instances *= 2;
    return instances;
  }

  // Cuts the steps where the maps have become so small that many more instances fit the cache.
  void cut_segments() {
    net_.segments.clear();
    for (size_t i = 0; i < net_.steps.size(); ++i) {
      const int64_t instances = sub_tile(net_.steps[i]);
      if (net_.segments.empty() || instances >= 2 * net_.segments.back().instances) {
        net_.segments.push_back({i, i + 1, instances});
      } else {
        net_.segments.back().end = i + 1;
        net_.segments.back().instances = std::min(net_.segments.back().instances, instances);
      }
    }
  }

  struct Lifetime {
    size_t begin, end;  // steps, both inclusive
    int64_t floats;
  };

  std::vector<Lifetime> lifetimes() {
    const size_t last = net_.steps.size() - 1;
    std::vector<size_t> segment_of(net_.steps.size());
    for (size_t s = 0; s < net_.segments.size(); ++s)
      for (size_t i = net_.segments[s].begin; i < net_.segments[s].end; ++i) segment_of[i] = s;
    std::vector<Lifetime> lives(net_.values.size(), {1, 0, 0});  // empty: fused away
    for (size_t i = 0; i <= last; ++i) lives[net_.steps[i].output] = {i, i, 0};
    for (size_t i = 0; i <= last; ++i)
      for (int64_t v : reads(net_.steps[i])) lives[v].end = i;
    for (int64_t v : {net_.logits, net_.features})
      if (v >= 0) lives[v].end = last + 1;
    for (size_t v = 0; v < lives.size(); ++v) {
      Lifetime& life = lives[v];
      if (life.begin > life.end) continue;
      const Segment& segment = net_.segments[segment_of[life.begin]];
      Value& value = net_.values[v];
      value.whole = life.end >= segment.end;
      if (value.whole) {
        life.begin = segment.begin;
        life.end = life.end > last ? last + 1 : net_.segments[segment_of[life.end]].end - 1;
      }
      // One vector to spare: kernels for narrow pitches store whole vectors.
      life.floats = round_up(value.floats * (value.whole ? net_.tile : segment.instances) + kernels_.lanes, 16);
    }
    return lives;
  }

  // First fit: every value at the lowest offset where no value alive at the same time lies.
  void place(const std::vector<Lifetime>& lives) {
    std::vector<size_t> placed;
    net_.arena_floats = 0;
    for (size_t v = 0; v < lives.size(); ++v) {
      if (lives[v].begin > lives[v].end) continue;
      std::vector<std::pair<int64_t, int64_t>> taken;
      for (size_t other : placed)
        if (lives[other].begin <= lives[v].end && lives[v].begin <= lives[other].end)
          taken.push_back({net_.values[other].offset, net_.values[other].offset + lives[other].floats});
      std::sort(taken.begin(), taken.end());
      int64_t offset = 0;
      for (const auto& gap : taken)
        if (offset + lives[v].floats > gap.first) offset = std::max(offset, gap.second);
      net_.values[v].offset = offset;
      net_.arena_floats = std::max(net_.arena_floats, offset + lives[v].floats);
      placed.push_back(v);
    }
  }

  void place_values() {
    for (net_.tile = kMaxTile;; net_.tile /= 2) {
      cut_segments();
      place(lifetimes());
      if (net_.tile == 1 || net_.arena_floats * 4 <= kArenaBytes) break;
    }
    if (net_.arena_floats > kMaxFloats)
      throw std::invalid_argument("stage '" + net_.name + "' needs " + std::to_string(net_.arena_floats >> 28) +
                                  " GiB for the activations of one instance, expected at most 8");
  }

  void measure() {
    double weights = 0, uses = 0;
    for (const Step& step : net_.steps) {
      weights += static_cast<double>(step.weights.size());
      uses += static_cast<double>(step.weights.size()) * static_cast<double>(step.work);
    }
    net_.rows_alone = uses < kFewUses * weights ? kFewRows : 1;
    finish_winograd(4 * weights > kNearBytes);
    net_.weight_bytes = 0;
    for (const Step& step : net_.steps)
      net_.weight_bytes +=
          4 * (step.weights.size() + step.plain_weights.size() + static_cast<int64_t>(step.bias.size()));
  }

  void finish_winograd(bool keep_plain_weights) {
    net_.scratch_floats = 0;
    int64_t zeros = 0;
    for (Step& step : net_.steps) {
      if (step.kind != StepKind::winograd) continue;
      Winograd& c = step.winograd;
      // Weights of wide layers and of large networks come from far: read them for more tiles at once.
      c.tiles_at_once = kernels_.tile_rows * (keep_plain_weights || c.channels > 64 ? 2 : 1);
      if (keep_plain_weights)
        c.plain = step.plain_weights.data();
      else
        step.plain_weights = Buffer();
      zeros = std::max(zeros, c.in_width * c.in_pitch);
      net_.scratch_floats = std::max(net_.scratch_floats, winograd_scratch(c, kernels_));
    }
    net_.zeros = Buffer(zeros);
    for (Step& step : net_.steps) step.winograd.zeros = net_.zeros.data();
  }
};

}  // namespace

Buffer::Buffer(int64_t floats) : size_(floats) {
  const size_t bytes = static_cast<size_t>(round_up(std::max<int64_t>(floats, 16), 16)) * sizeof(float);
  data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!data_) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
}

std::string Shape::text() const {
  return "(" + std::to_string(c) + ", " + std::to_string(h) + ", " + std::to_string(w) + ")";
}

Network build_network(const StageSpec& spec, const KernelTable& kernels, const std::string& forced) {
  if (!forced.empty() && forced != "conv_direct_f32" && forced != "conv3x3_winograd_f32")
    throw std::invalid_argument("unknown kernel '" + forced + "'; expected conv_direct_f32 or conv3x3_winograd_f32");
  return Builder(spec, kernels, forced).build();
}

}  // namespace fastcascade
