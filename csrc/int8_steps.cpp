#include "int8_steps.h"

#include <algorithm>
#include <array>
#include <limits>

#include "kernel_choice.h"
#include "pack.h"

namespace fastcascade {
namespace {

// How the terms of a position lie in runs; see Int8Conv. Tap t of pixel p starts at
// (t / taps) · terms + (t % taps + p · pixel_taps) · tap_terms.
struct Runs {
  int64_t count, terms, taps, tap_terms;
  int64_t joined = 1, pixel_taps = 0;
};

// Weights [group][panel][run][terms / group][panel's lanes][group] of the kernels' term type, where `group` counts the
// terms of a dot product and a group of channels has `blocks` vectors of outputs, those of all joined pixels. The order
// of terms is (ky, kx, channel). Terms that a pixel does not have are zero.
template <class Term>
Buffer pack_int8(const MergedWeights& m, const Runs& runs, int64_t blocks, const Int8Kernels& kernels) {
  const int64_t lanes = kernels.lanes, group = kernels.group, area = m.kh * m.kw, depth = runs.count * runs.terms;
  const int64_t per_group = m.out / m.groups, pitch = blocks * lanes / runs.joined;
  const int64_t bytes = m.groups * blocks * lanes * depth * static_cast<int64_t>(sizeof(Term));
  Buffer packed(round_up(bytes, 4) / 4);
  Term* panel = reinterpret_cast<Term*>(packed.data());
  for (int64_t g = 0; g < m.groups; ++g)
    for (int64_t p = 0; p < int8_panels(blocks); ++p) {
      const int64_t first = p * kInt8PanelBlocks * lanes,
                    width = std::min(kInt8PanelBlocks * lanes, blocks * lanes - first);
      for (int64_t column = first; column < first + width; ++column) {
        const int64_t o = column % pitch, pixel = column / pitch;
        if (o >= per_group) continue;
        for (int64_t i = 0; i < m.in; ++i)
          for (int64_t tap = 0; tap < area; ++tap) {
            const int64_t at =
                tap / runs.taps * runs.terms + (tap % runs.taps + pixel * runs.pixel_taps) * runs.tap_terms + i;
            panel[at / group * width * group + (column - first) * group + at % group] =
                static_cast<Term>(m.weight[((g * per_group + o) * m.in + i) * area + tap]);
          }
      }
      panel += depth * width;
    }
  return packed;
}

Buffer pack_int8(const MergedWeights& m, const Runs& runs, int64_t blocks, const Int8Kernels& kernels) {
  return kernels.term_bytes == 2 ? pack_int8<int16_t>(m, runs, blocks, kernels)
                                 : pack_int8<int8_t>(m, runs, blocks, kernels);
}

// 2 G w (2 G)ᵀ of 3×3 weights.
std::array<float, 16> transform_weights(const float* w) {
  const auto transform = [](float a, float b, float c) {
    return std::array<float, 4>{2 * a, a + b + c, a - b + c, 2 * c};
  };
  std::array<float, 16> u{};
  std::array<std::array<float, 4>, 3> columns{};
  for (size_t x = 0; x < 3; ++x) columns[x] = transform(w[x], w[3 + x], w[6 + x]);
  for (size_t y = 0; y < 4; ++y) {
    const std::array<float, 4> row = transform(columns[0][y], columns[1][y], columns[2][y]);
    std::copy(row.begin(), row.end(), u.begin() + static_cast<std::ptrdiff_t>(4 * y));
  }
  return u;
}

// The transformed weights of Winograd, as those of a 4×4 convolution: pack_int8 leaves the terms of each of the 16 taps
// together, which are those of a product.
MergedWeights winograd_weights(const MergedWeights& m) {
  MergedWeights transformed{std::vector<float>(m.weight.size() / 9 * 16), m.groups, m.out, m.in, 4, 4};
  for (size_t i = 0; i < m.weight.size() / 9; ++i) {
    const std::array<float, 16> u = transform_weights(m.weight.data() + 9 * i);
    std::copy(u.begin(), u.end(), transformed.weight.begin() + static_cast<std::ptrdiff_t>(16 * i));
  }
  return transformed;
}

// The sums start where bytes that are all zero points, times the weights, end at zero.
std::vector<int32_t> sum_starts(const OpSpec& op, int64_t pitch) {
  std::vector<int32_t> starts(static_cast<size_t>(pitch), 0);
  const size_t terms = op.weight.size() / static_cast<size_t>(op.weight_shape[0]);
  for (size_t i = 0; i < op.weight.size(); ++i)
    starts[i / terms] -= static_cast<int32_t>(op.int8.zero_point) * static_cast<int32_t>(op.weight[i]);
  return starts;
}

Int8Epilogue pack_epilogue(Step& step, const OpSpec& op, int64_t pitch) {
  const auto channels = static_cast<size_t>(pitch);
  const Int8Spec& s = op.int8;
  step.int8.start = sum_starts(op, pitch);
  step.int8.multiplier = s.multiplier;
  step.int8.multiplier.resize(channels, 0.f);
  step.bias = op.bias;
  step.bias.resize(channels, 0.f);
  return {step.int8.start.data(),
          step.int8.multiplier.data(),
          step.bias.data(),
          nullptr,
          s.residual_scale,
          static_cast<float>(s.residual_zero_point),
          s.low,
          s.high,
          s.output_zero_point.has_value(),
          static_cast<int32_t>(s.output_zero_point.value_or(0))};
}

// Zero points. Kernels read whole vectors.
std::vector<uint8_t> padding_pixels(const OpSpec& op, const ConvGeometry& g, int64_t pixels) {
  constexpr int64_t kSlack = 16;
  return std::vector<uint8_t>(static_cast<size_t>(pixels * g.in_pitch + kSlack),
                              static_cast<uint8_t>(op.int8.zero_point));
}

void pack_depthwise_layer(Step& step, const OpSpec& op, const ConvGeometry& g, int64_t lanes) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  step.weights = Buffer(taps * g.pitch);
  auto* weights = reinterpret_cast<int32_t*>(step.weights.data());
  for (int64_t c = 0; c < op.weight_shape[0]; ++c)
    for (int64_t tap = 0; tap < taps; ++tap)
      weights[c / lanes * lanes * taps + tap * lanes + c % lanes] = static_cast<int32_t>(op.weight[c * taps + tap]);
  step.int8.padding = padding_pixels(op, g, g.in_width);
  step.int8.scratch_floats = taps * static_cast<int64_t>(sizeof(uint8_t*) / sizeof(float));
  Int8Depthwise& c = step.int8.depthwise;
  c.weights = weights;
  c.padding = step.int8.padding.data();
  c.geometry = g;
  c.epilogue = pack_epilogue(step, op, g.pitch);
}

// What a way to find terms costs, for a row of output pixels: about as many cycles where a product of 16 × 64 terms
// takes one.
struct TermsCost {
  int64_t joined, cycles;
};

constexpr int64_t kCopyCycles = 3;  // of a vector

int64_t product_cycles(const Int8Conv& c, int64_t positions, int64_t runs, int64_t run_terms,
                       const Int8Kernels& kernels) {
  return positions * runs * round_up(run_terms, kernels.run_unit) * c.blocks_per_group / 64;
}

// Vectors that are copied for some pixels of the input, which follow each other.
int64_t copied_vectors(const Int8Conv& c, int64_t pixels) {
  return c.tap_terms == c.geometry.in_pitch ? 1 + pixels * c.tap_terms / 64 : pixels;
}

TermsCost gathered_cost(const Int8Conv& c, const Int8Kernels& kernels) {
  const ConvGeometry& g = c.geometry;
  const int64_t copies = g.width * g.kernel_h * copied_vectors(c, g.kernel_w);
  return {1, product_cycles(c, g.width, 1, g.kernel_h * g.kernel_w * c.tap_terms, kernels) + kCopyCycles * copies};
}

// Of equal numbers of joined pixels, the largest loads terms the least often. Joining pays where the terms of a row of
// the kernel are far fewer than a run is rounded up to.
TermsCost padded_cost(const Int8Conv& c, bool may_join, const Int8Kernels& kernels) {
  const ConvGeometry& g = c.geometry;
  const int64_t taps = g.dilation_w == 1 ? g.kernel_w : 1, runs = g.kernel_h * g.kernel_w / taps;
  const int64_t reach = (g.kernel_w - 1) * g.dilation_w + 1;
  const int64_t copies = g.stride_h * copied_vectors(c, (g.width - 1) * g.stride_w + reach);
  TermsCost best{1, std::numeric_limits<int64_t>::max()};
  for (const int64_t joined : {1, 2, 4}) {
    if (joined > 1 && (!may_join || g.dilation_w > 1 || g.width % joined)) continue;
    const int64_t positions = c.has_stride() ? round_up(g.width / joined, kernels.least_rows)
                                             : round_up(g.width + reach - 1, joined) / joined;
    const int64_t run_terms = (taps + (joined - 1) * g.stride_w) * c.tap_terms;
    const int64_t products = joined * product_cycles(c, positions, runs, run_terms, kernels);
    if (products + kCopyCycles * copies <= best.cycles) best = {joined, products + kCopyCycles * copies};
  }
  return best;
}

// Chooses where the terms of a position lie.
void choose_terms(Int8Conv& c, const OpSpec& op, const MergedWeights& m, const Int8Kernels& kernels) {
  const ConvGeometry& g = c.geometry;
  const std::array<int64_t, 4> none{};
  c.joined = 1;
  c.terms = Int8Terms::gathered;
  if (g.kernel_h * g.kernel_w == 1) {
    if (!c.has_stride() && op.padding == none && kernels.term_bytes == 1) c.terms = Int8Terms::in_place;
    return;
  }
  const TermsCost padded = padded_cost(c, m.groups == 1 && c.epilogue.to_bytes, kernels);
  if (padded.cycles > gathered_cost(c, kernels).cycles) return;
  c.terms = Int8Terms::padded;
  c.joined = padded.joined;
}

// Sets where the terms of a position lie; returns how they make runs.
Runs place_terms(Step& step) {
  Int8Conv& c = step.int8.conv;
  const ConvGeometry& g = c.geometry;
  const bool padded = c.terms == Int8Terms::padded;
  const int64_t taps = g.kernel_h * g.kernel_w, reach = (g.kernel_w - 1) * g.dilation_w + 1;
  c.row_pixels = round_up((g.width - 1) * g.stride_w + reach, c.joined);
  // The taps of a row follow each other in padded rows; runs of one tap would round up the terms of each.
  const int64_t run_taps = !padded ? taps : g.dilation_w == 1 ? g.kernel_w : 1;
  for (int64_t tap = 0; tap < taps; tap += run_taps)
    step.int8.runs.push_back((tap / g.kernel_w * g.dilation_h * c.row_pixels + tap % g.kernel_w * g.dilation_w) *
                             c.tap_terms);
  c.runs = step.int8.runs.data();
  c.run_count = static_cast<int64_t>(step.int8.runs.size());
  return {c.run_count, (run_taps + (c.joined - 1) * g.stride_w) * c.tap_terms, run_taps, c.tap_terms, c.joined,
          g.stride_w};
}

// The channels of all joined pixels follow each other.
void repeat_channels(Step& step, int64_t joined) {
  const auto repeat = [joined](auto& channels) {
    const auto once = channels;
    for (int64_t i = 1; i < joined; ++i) channels.insert(channels.end(), once.begin(), once.end());
    return channels.data();
  };
  Int8Epilogue& e = step.int8.conv.epilogue;
  e.start = repeat(step.int8.start);
  e.multiplier = repeat(step.int8.multiplier);
  e.bias = repeat(step.bias);
}

void pack_matrix_product(Step& step, const OpSpec& op, const MergedWeights& weights, const Int8Kernels& kernels) {
  Int8Conv& c = step.int8.conv;
  choose_terms(c, op, weights, kernels);
  Runs runs = place_terms(step);
  c.run_terms = runs.terms = round_up(runs.terms, kernels.run_unit);
  c.position_terms = c.terms == Int8Terms::padded     ? c.joined * c.geometry.stride_w * c.tap_terms
                     : c.terms == Int8Terms::gathered ? c.run_terms
                                                      : c.geometry.in_pitch;
  c.blocks_per_group *= c.joined;
  step.panels = weights.groups * int8_panels(c.blocks_per_group);
  repeat_channels(step, c.joined);
  step.weights = pack_int8(weights, runs, c.blocks_per_group, kernels);
  c.chunk_items = int8_chunk_items(c, kernels);
  if (c.terms == Int8Terms::padded) {
    step.work_items = c.geometry.height;
    step.min_items = std::max<int64_t>(1, step.min_items / c.geometry.width);
  }
  step.int8.scratch_floats = round_up(int8_scratch_bytes(c, kernels), 4) / 4;
}

void pack_winograd_product(Step& step, const OpSpec& op, const MergedWeights& weights, const Int8Kernels& kernels) {
  Int8Conv& c = step.int8.conv;
  step.weights = pack_int8(winograd_weights(weights), {16, c.tap_terms, 1, c.tap_terms}, c.blocks_per_group, kernels);
  step.int8.padding = padding_pixels(op, c.geometry, 1);
  c.padding = step.int8.padding.data();
  step.work_items = ((c.geometry.height + 1) / 2) * ((c.geometry.width + 1) / 2);
  step.min_items = kernels.rows;
  step.int8.scratch_floats = round_up(int8_winograd_scratch_bytes(c, kernels), 4) / 4;
}

// Groups are merged as far as the vectors that the pitch is a multiple of: then all channels of a pixel are written.
void pack_product(Step& step, const OpSpec& op, const ConvGeometry& g, int64_t pitch_lanes,
                  const Int8Kernels& kernels) {
  const MergedWeights merged = merge_groups(op, pitch_lanes);
  Int8Conv& c = step.int8.conv;
  c.geometry = g;
  c.group_channels = merged.in;
  c.tap_terms = round_up(merged.in, kernels.group);
  c.blocks_per_group = g.pitch / kernels.lanes / merged.groups;
  c.zero_point = static_cast<uint8_t>(op.int8.zero_point);
  c.epilogue = pack_epilogue(step, op, g.pitch);
  step.panels = merged.groups * int8_panels(c.blocks_per_group);
  c.joined = 1;
  if (step.kind == StepKind::int8_winograd)
    pack_winograd_product(step, op, merged, kernels);
  else
    pack_matrix_product(step, op, merged, kernels);
  c.weights = step.weights.data();
}

// float32 values of invalid instances become NaN.
void invalidate(float* y, const Value& out, const int32_t* invalid, Range pixels, Range channels) {
  const int64_t area = out.shape.h * out.shape.w;
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel)
    if (__atomic_load_n(invalid + pixel / area, __ATOMIC_RELAXED))
      std::fill(y + pixel * out.pitch + channels.begin, y + pixel * out.pitch + channels.end,
                std::numeric_limits<float>::quiet_NaN());
}

// The same for Winograd's tiles of 2×2 pixels.
void invalidate_tiles(float* y, const Value& out, const int32_t* invalid, Range tiles, Range channels) {
  const int64_t across = (out.shape.w + 1) / 2, down = (out.shape.h + 1) / 2;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t image = tile / across / down, top = tile / across % down * 2, left = tile % across * 2;
    for (int64_t row = top; row < std::min(top + 2, out.shape.h); ++row) {
      const int64_t pixel = (image * out.shape.h + row) * out.shape.w + left;
      invalidate(y, out, invalid, {pixel, pixel + std::min<int64_t>(2, out.shape.w - left)}, channels);
    }
  }
}

// The channels of some panels of a product.
Range channels_of(const Int8Conv& c, Range panels, int64_t lanes) {
  const int64_t per_group = int8_panels(c.blocks_per_group);
  const auto channel = [&](int64_t panel) {
    return (panel / per_group * c.blocks_per_group + panel % per_group * kInt8PanelBlocks) * lanes;
  };
  return {channel(panels.begin), channel(panels.end)};
}

template <class Layer>
Layer placed(Layer c, const StepPlaces& at) {
  c.input = reinterpret_cast<const uint8_t*>(at.input);
  c.output = at.output;
  c.epilogue.residual = reinterpret_cast<const uint8_t*>(at.residual);
  return c;
}

// Terms and outputs of a chunk. They stay in the first-level cache where weights are few. Many weights are read from
// further away for every chunk, so chunks are larger then.
int64_t chunk_terms(const Int8Conv& c, const Int8Kernels& kernels) {
  const int64_t weights = c.depth() * c.blocks_per_group * kernels.lanes;
  return std::clamp<int64_t>(weights / 2, 32 << 10, kernels.chunk_terms);
}

}  // namespace

int64_t int8_chunk_items(const Int8Conv& c, const Int8Kernels& kernels) {
  const ConvGeometry& g = c.geometry;
  const int64_t limit = chunk_terms(c, kernels);
  if (c.terms != Int8Terms::padded)
    return std::max<int64_t>(1, limit / (c.depth() + g.pitch) / kernels.rows) * kernels.rows;
  const int64_t rows = limit / (g.stride_h * c.row_pixels * c.tap_terms + g.width * g.pitch);
  return std::clamp<int64_t>(rows, 1, c.has_stride() ? kInt8Strips : (kInt8Strips - 2) * g.height);
}

int64_t int8_scratch_bytes(const Int8Conv& c, const Int8Kernels& kernels) {
  // Terms are copied by whole vectors, and a tile reads a whole run of all its rows.
  const int64_t slack = kernels.least_rows * c.position_terms + 128;
  int64_t terms = c.chunk_items * c.position_terms;
  if (c.terms == Int8Terms::in_place) terms = kernels.least_rows * c.position_terms;
  if (c.terms == Int8Terms::padded) {
    const ConvGeometry& g = c.geometry;
    const int64_t images = (c.chunk_items + g.height - 2) / g.height + 1;
    const int64_t rows = c.chunk_items * g.stride_h + images * (g.kernel_h - 1) * g.dilation_h;
    terms = rows * c.row_pixels * c.tap_terms;
  }
  return (terms + slack + c.run_terms) * kernels.term_bytes;
}

StepKind int8_step_kind(const OpSpec& op, const Shape& in, const Int8Kernels& kernels, int64_t pitch_lanes) {
  if (op.kind != OpKind::int8_conv2d) return StepKind::int8_conv;
  if (is_depthwise(op, in)) return StepKind::int8_depthwise;
  const int64_t merged = op.groups == 1 ? 1 : neighbours_to_merge(op, pitch_lanes);
  const bool fits = op.weight_shape[1] * merged <= kMaxInt8WinogradChannels;
  return is_3x3_without_stride(op) && fits && kernels.conv3x3_winograd ? StepKind::int8_winograd : StepKind::int8_conv;
}

void pack_int8_layer(Step& step, const OpSpec& op, const Value& in, const Value& out, int64_t pitch_lanes,
                     const Int8Kernels& kernels) {
  const ConvGeometry g{op.kernel[0],   op.kernel[1],  op.stride[0],  op.stride[1], op.dilation[0],
                       op.dilation[1], op.padding[0], op.padding[2], in.shape.h,   in.shape.w,
                       in.pitch,       out.shape.h,   out.shape.w,   out.pitch};
  if (step.kind == StepKind::int8_depthwise)
    pack_depthwise_layer(step, op, g, kernels.lanes);
  else
    pack_product(step, op, g, pitch_lanes, kernels);
}

Int8Pool int8_pool_arguments(const OpSpec& op, const Value& in, const Value& out) {
  Int8Pool c{};
  c.rows = {in.shape.h, out.shape.h, op.kernel[0], op.stride[0], op.padding[0], op.padding[1]};
  c.columns = {in.shape.w, out.shape.w, op.kernel[1], op.stride[1], op.padding[2], op.padding[3]};
  c.pitch = out.pitch;
  return c;
}

void run_int8_step(const Network& net, const Step& step, const StepPlaces& at, Range positions, Range panels) {
  const Int8Kernels& kernels = *net.int8_kernels;
  const Value& out = net.values[step.output];
  Range channels{0, out.pitch};
  switch (step.kind) {
    case StepKind::quantize:
      return kernels.quantize(step.int8.grid, at.input, reinterpret_cast<uint8_t*>(at.output), at.invalid, positions);
    case StepKind::dequantize:
      kernels.dequantize(step.int8.grid, reinterpret_cast<const uint8_t*>(at.input), at.output, positions);
      break;
    case StepKind::int8_pool: {
      Int8Pool c = step.int8.pool;
      c.input = reinterpret_cast<const uint8_t*>(at.input);
      c.output = reinterpret_cast<uint8_t*>(at.output);
      return kernels.pool_max(c, positions);
    }
    case StepKind::int8_depthwise: {
      Int8Depthwise c = placed(step.int8.depthwise, at);
      c.scratch = reinterpret_cast<const uint8_t**>(at.scratch);
      kernels.depthwise(c, positions);
      break;
    }
    default: {
      Int8Conv c = placed(step.int8.conv, at);
      c.scratch = at.scratch;
      channels = channels_of(c, panels, kernels.lanes);
      if (step.kind == StepKind::int8_conv) {
        kernels.conv(c, positions, panels);
        break;
      }
      kernels.conv3x3_winograd(c, positions, panels);
      if (!out.bytes) invalidate_tiles(at.output, out, at.invalid, positions, channels);
      return;
    }
  }
  const bool by_rows = step.kind == StepKind::int8_conv && step.int8.conv.terms == Int8Terms::padded;
  const int64_t pixels = by_rows ? out.shape.w : 1;
  if (!out.bytes) invalidate(at.output, out, at.invalid, {positions.begin * pixels, positions.end * pixels}, channels);
}

}  // namespace fastcascade
