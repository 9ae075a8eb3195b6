#include "fusion.h"

#include <algorithm>

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

}  // namespace

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
