#include "fusion.h"

#include <algorithm>

#include "kernel_choice.h"

namespace fastcascade {
namespace {

int64_t count_reads(const StageSpec& stage, int64_t value) {
  int64_t reads = stage.is_result(value);
  for (const OpSpec& op : stage.ops)
    reads += std::count(op.inputs.begin(), op.inputs.end(), value) + (op.residual == value);
  return reads;
}

// True where `add` is the only reader of the convolution just before it, and adds something else to it.
bool can_fuse(const StageSpec& stage, const OpSpec& conv, const OpSpec& add) {
  if (add.kind != OpKind::add || conv.kind != OpKind::conv2d) return false;
  if (conv.residual >= 0 || add.has_activation() || add.inputs[0] == add.inputs[1]) return false;
  const bool reads_conv = add.inputs[0] == conv.output || add.inputs[1] == conv.output;
  return reads_conv && count_reads(stage, conv.output) == 1;
}

// True where `pool` is a 2×2 maximum of whole windows, and the only reader of a convolution by Winograd, whose tiles
// hold whole windows. Clamps commute with the maximum.
bool can_fuse_pool(const StageSpec& stage, const std::vector<Shape>& shapes, const OpSpec& conv, const OpSpec& pool,
                   const KernelTable& kernels, const std::string& forced) {
  const std::array<int64_t, 2> two{2, 2};
  if (pool.kind != OpKind::pool || !pool.is_max || pool.kernel != two || pool.stride != two) return false;
  if (conv.kind != OpKind::conv2d || conv.output != pool.inputs[0] || count_reads(stage, conv.output) != 1)
    return false;
  if (conv.residual >= 0 || conv.activation.is_function()) return false;
  const Shape &in = shapes[conv.inputs[0]], &sums = shapes[conv.output];
  const Shape whole{sums.c, sums.h / 2, sums.w / 2};
  return pool.padding == std::array<int64_t, 4>{} && shapes[pool.output] == whole &&
         choose_conv_kernel(conv, in, sums, kernels, forced) == ConvKernel::winograd;
}

}  // namespace

void fuse_max_pools(StageSpec& stage, const std::vector<Shape>& shapes, const KernelTable& kernels,
                    const std::string& forced) {
  for (size_t i = 1; i < stage.ops.size(); ++i) {
    OpSpec &conv = stage.ops[i - 1], &pool = stage.ops[i];
    if (!can_fuse_pool(stage, shapes, conv, pool, kernels, forced)) continue;
    conv.max_pooled = true;
    conv.output = pool.output;
    stage.ops.erase(stage.ops.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void fuse_residual_adds(StageSpec& stage) {
  for (size_t i = 1; i < stage.ops.size(); ++i) {
    OpSpec &conv = stage.ops[i - 1], &add = stage.ops[i];
    if (!can_fuse(stage, conv, add)) continue;
    conv.residual = add.inputs[add.inputs[0] == conv.output ? 1 : 0];
    conv.residual_after_activation = true;
    conv.output = add.output;
    stage.ops.erase(stage.ops.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace fastcascade
