// Steps that move values and compute nothing. `x` and `y` are the input and the output of `step` in the arena; the
// range counts output pixels over all instances of the sub-tile unless said otherwise.
#pragma once

#include "network.h"
#include "source.h"

namespace fastcascade {

// Loads lines [begin, end) of the image or feature map source.index[instance] into value 0.
void load_lines(const Network& net, const Source& source, int64_t instance, float* y, Range lines);
void pad_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels);
void reorder_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels);
void reshape_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels);
void slice_f32(const Network& net, const Step& step, const float* x, float* y, Range pixels);
void concat_f32(const Network& net, const Step& step, const float* const* inputs, float* y, Range pixels);
void flatten_f32(const Network& net, const Step& step, const float* x, float* y, Range instances);

}  // namespace fastcascade
