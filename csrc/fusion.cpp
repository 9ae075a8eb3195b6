#include "fusion.h"

#include <algorithm>
#include <utility>

#include "kernel_choice.h"

namespace fastcascade {
namespace {

std::vector<int64_t> count_reads(const StageSpec& stage, size_t values) {
  std::vector<int64_t> reads(values);
  for (const OpSpec& op : stage.ops) {
    for (int64_t v : op.inputs) ++reads[v];
    if (op.residual >= 0) ++reads[op.residual];
  }
  for (size_t v = 0; v < values; ++v) reads[v] += stage.is_result(static_cast<int64_t>(v));
  return reads;
}

// The operations that apply an activation to their result.
bool has_epilogue(const OpSpec& op) {
  return op.kind == OpKind::conv2d || op.kind == OpKind::linear || op.kind == OpKind::add ||
         op.kind == OpKind::multiply || op.kind == OpKind::scale_shift;
}

void fuse_activations(StageSpec& stage, const std::vector<int64_t>& reads) {
  std::vector<OpSpec> ops;
  ops.reserve(stage.ops.size());
  std::vector<OpSpec*> writers(reads.size(), nullptr);
  for (OpSpec& op : stage.ops) {
    OpSpec* before = writers[op.inputs[0]];
    const int64_t output = op.output;
    if (op.kind == OpKind::activation && before && has_epilogue(*before) && !before->has_activation() &&
        reads[before->output] == 1) {
      before->activation = op.activation;
      before->output = output;
    } else {
      ops.push_back(std::move(op));
      before = &ops.back();
    }
    writers[output] = before;
  }
  stage.ops = std::move(ops);
}

// True where `add` is the only reader of the convolution just before it, and adds something else of its shape to it.
bool can_fuse(const OpSpec& conv, const OpSpec& add, const std::vector<int64_t>& reads,
              const std::vector<Shape>& shapes) {
  if (add.kind != OpKind::add || conv.kind != OpKind::conv2d) return false;
  if (conv.residual >= 0 || add.has_activation() || add.inputs[0] == add.inputs[1]) return false;
  if (!stays_finite(conv.activation.function) || !(shapes[add.inputs[0]] == shapes[add.inputs[1]])) return false;
  const bool reads_conv = add.inputs[0] == conv.output || add.inputs[1] == conv.output;
  return reads_conv && reads[conv.output] == 1;
}

void fuse_residual_adds(StageSpec& stage, const std::vector<int64_t>& reads, const std::vector<Shape>& shapes) {
  for (size_t i = 1; i < stage.ops.size(); ++i) {
    OpSpec &conv = stage.ops[i - 1], &add = stage.ops[i];
    if (!can_fuse(conv, add, reads, shapes)) continue;
    conv.residual = add.inputs[add.inputs[0] == conv.output ? 1 : 0];
    conv.residual_after_activation = true;
    conv.output = add.output;
    stage.ops.erase(stage.ops.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// True where `pool` is a 2×2 maximum of whole windows, and the only reader of a convolution by Winograd, whose tiles
// hold whole windows. Clamps commute with the maximum.
bool can_fuse_pool(const OpSpec& conv, const OpSpec& pool, const std::vector<int64_t>& reads,
                   const std::vector<Shape>& shapes, const KernelTable& kernels, const std::string& forced) {
  const std::array<int64_t, 2> two{2, 2};
  if (pool.kind != OpKind::pool || !pool.is_max || pool.kernel != two || pool.stride != two) return false;
  if (conv.kind != OpKind::conv2d || conv.output != pool.inputs[0] || reads[conv.output] != 1) return false;
  if (conv.residual >= 0 || conv.activation.is_function()) return false;
  const Shape &in = shapes[conv.inputs[0]], &sums = shapes[conv.output];
  const Shape whole{sums.c, sums.h / 2, sums.w / 2};
  return pool.padding == std::array<int64_t, 4>{} && shapes[pool.output] == whole &&
         choose_conv_kernel(conv, in, sums, kernels, forced) == ConvKernel::winograd;
}

}  // namespace

bool stays_finite(Function function) {
  return function != Function::exp && function != Function::sqrt && function != Function::reciprocal;
}

void fuse_operations(StageSpec& stage, const std::vector<Shape>& shapes) {
  const std::vector<int64_t> reads = count_reads(stage, shapes.size());
  fuse_activations(stage, reads);
  fuse_residual_adds(stage, reads, shapes);
}

void fuse_max_pools(StageSpec& stage, const std::vector<Shape>& shapes, const KernelTable& kernels,
                    const std::string& forced) {
  const std::vector<int64_t> reads = count_reads(stage, shapes.size());
  for (size_t i = 1; i < stage.ops.size(); ++i) {
    OpSpec &conv = stage.ops[i - 1], &pool = stage.ops[i];
    if (!can_fuse_pool(conv, pool, reads, shapes, kernels, forced)) continue;
    conv.max_pooled = true;
    conv.output = pool.output;
    stage.ops.erase(stage.ops.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace fastcascade
