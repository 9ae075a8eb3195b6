// All kernels. An instruction set's file includes this after its vector operations. The order matters.
// clang-format off
#include "functions.inl"
#include "epilogue.inl"
FC_INLINE V dot(V x, V w, V sum) { return fma(x, w, sum); }
#include "gemm.inl"
#include "pixel_runs.inl"
#include "direct.inl"
#include "winograd.inl"
#include "depthwise.inl"
#include "pool.inl"
#include "elementwise.inl"
#include "channels.inl"
#include "resize.inl"
// clang-format on

static constexpr KernelTable make_table(const char* isa) {
  return {isa,
          kLanes,
          kMr,
          kNrBlocks,
          conv_direct,
          conv3x3_winograd_f32,
          transform_weights_f32,
          conv_depthwise_f32,
          pool_f32,
          elementwise_f32,
          layer_norm_f32,
          softmax_f32,
          channel_reduce_f32,
          resize_f32};
}
