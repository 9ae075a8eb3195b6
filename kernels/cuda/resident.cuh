// A whole cascade in one launch. A block takes images from a queue and keeps their activations in shared memory. It
// runs a network on an image, then the exit head. If the selector says "go on", the same block runs the next network,
// or the next segment of the same one on the activations that are still there.
//
// A stage whose weights are large for its few pixels runs on a group of images: its first layers take one image after
// the other, its last layers all of them at once. Images that reach such a stage wait in a list of their block until
// the group is full. At the end the lists are emptied: a group that is not full runs image by image. Neither the order
// nor the group changes an image's sums, so its bits are always the same.
//
// Read in this order: resident_table.cuh (the table that drives the kernel), resident_maps.cuh (shared memory and how
// warps divide a layer), resident_conv.cuh, resident_layers.cuh, this file. The planner is resident_plan.py; the
// semantics are those of `resident` in kernels/reference.py. FC_LAYERS and FC_HEADS list the layer types to compile.
//
// Bodies are templates on a context, as in context.cuh: resident.cu has the GPU's, tests/gpu/emulator the host's.
// Beyond context.cuh, a context has loads and stores of shared memory by byte offset, load_matrix, mma, pack, unpack,
// max2, and
//   converge(): __syncwarp;
//   obscure_thread(): hides from the compiler that thread() is constant. Otherwise it would compute everything that
//   depends on the thread once, ahead of all layer types, and spill.
#pragma once

#include "resident_layers.cuh"

namespace fastcascade {

// A layer to run, and the image of the group that it runs on.
struct Position {
  int layer, slot;
};

// First all images one by one through the layers before `deep`. Then layer by layer: all images at once if the group
// is full, else one after the other.
FC_FUNCTION Position next_position(const ResidentStage& stage, Position at, int present) {
  const bool more = at.slot + 1 < present;
  if (at.layer >= stage.deep) {
    const bool turns = present < stage.images && more;
    return turns ? Position{at.layer, at.slot + 1} : Position{at.layer + 1, 0};
  }
  if (at.layer + 1 < stage.deep) return {at.layer + 1, at.slot};
  return more ? Position{stage.first, at.slot + 1} : Position{stage.deep, 0};
}

template <class Context>
FC_FUNCTION void run_layer(Context& context, int type, const Work& work, Quad (&w)[kFirst]) {
  switch (type) {
#define FC_CASE(number, ...) \
  case number: return __VA_ARGS__::run(context, work, w);
    FC_LAYERS(FC_CASE)
#undef FC_CASE
  }
}

template <class Context>
FC_FUNCTION bool run_head(Context& context, int type, const Work& work, int stage) {
  switch (type) {
#define FC_CASE(number, ...) \
  case number: return __VA_ARGS__::run(context, work, stage);
    FC_HEADS(FC_CASE)
#undef FC_CASE
  }
  return true;
}

template <class Context>
FC_FUNCTION int image_of(Context& context, int slot) {
  return static_cast<int>(context.load32((kImageWords + slot) * 4));
}

// One network, or one segment, on the images in the control words. Bit i of the result: image i stops.
template <class Context>
FC_FUNCTION unsigned int run_stage(Context& context, const ResidentCascade& net, int number, int present) {
  const ResidentStage& stage = net.stages[number];
  const auto first_weights = [&](int layer) {
    return net.weights + net.layers[layer].weights[context.warp()] + context.lane();
  };
  Quad w[kFirst];
  load_first(context, w, first_weights(stage.first));
  Position at{stage.first, 0};
#pragma unroll 1
  while (at.layer < stage.head) {
    context.obscure_thread();
    const ResidentLayer& layer = net.layers[at.layer];
    const Position next = next_position(stage, at, present);
    const bool together = at.layer >= stage.deep && present == stage.images;
    const Work work{net, layer, Offsets(layer, at.slot), first_weights(next.layer), image_of(context, at.slot)};
    run_layer(context, together ? layer.group_type : layer.type, work, w);
    if (next.layer != at.layer) context.sync();  // images that take turns at a layer share no map
    at = next;
  }
  unsigned int stops = 0;
#pragma unroll 1
  for (int slot = 0; slot < present; slot++) {
    context.obscure_thread();
    const ResidentLayer& head = net.layers[stage.head];
    const Work work{net, head, Offsets(head, slot), nullptr, image_of(context, slot)};
    if (run_head(context, head.type, work, number)) stops |= 1u << slot;
  }
  return stops;
}

// ---- the schedule; thread 0 alone reads and writes the lists ----

template <class Context>
FC_FUNCTION int waiting(Context& context, int stage) {
  return static_cast<int>(context.load32((kLists + stage * kListWords) * 4));
}

template <class Context>
FC_FUNCTION void push(Context& context, int stage, int image) {
  const int list = kLists + stage * kListWords, length = waiting(context, stage);
  context.store32((list + 1 + length) * 4, image);
  context.store32(list * 4, length + 1);
}

template <class Context>
FC_FUNCTION int pop(Context& context, int stage) {
  const int list = kLists + stage * kListWords, length = waiting(context, stage) - 1;
  context.store32(list * 4, length);
  return static_cast<int>(context.load32((list + 1 + length) * 4));
}

// Choose a stage and its images: the deepest stage with a full group; else the first stage, with new images; else the
// earliest stage for which images wait. Writes the stage, or stage_count at the end.
//   upcoming: the next images of the queue, which are asked for long before they are needed.
template <class Context>
FC_FUNCTION void choose(Context& context, const ResidentCascade& net, int& upcoming) {
  int stage = net.stage_count - 1, present = 0;
  while (stage > 0 && waiting(context, stage) < net.stages[stage].images) stage--;
  if (stage == 0 && upcoming < net.count) {
    for (; present < net.taken && upcoming + present < net.count; present++)
      context.store32((kImageWords + present) * 4, upcoming + present);
    upcoming = context.atomic_add(net.queue, net.taken);
  } else {
    if (stage == 0)
      for (stage = 1; stage < net.stage_count && waiting(context, stage) == 0;) stage++;
    if (stage < net.stage_count)
      for (; present < net.stages[stage].images && waiting(context, stage) > 0; present++)
        context.store32((kImageWords + present) * 4, pop(context, stage));
  }
  context.store32(kStageWord * 4, stage);
  context.store32(kPresentWord * 4, present);
}

// After a stage: where its images go.
template <class Context>
FC_FUNCTION void retire(Context& context, const ResidentCascade& net, int stage, int present, unsigned int stops) {
  for (int slot = 0; slot < present; slot++) {
    const int image = image_of(context, slot);
    const bool stop = stops >> slot & 1, last = stage + 1 == net.stage_count;
    if (!stop && !last) push(context, stage + 1, image);
    if (net.keep != nullptr && (stop || last)) {
      net.keep[image] = !stop;
      if (!stop) context.atomic_add(net.block_counts + image / kRows, 1);
    }
  }
}

template <class Context>
FC_FUNCTION void run_cascade(Context& context, const ResidentCascade& net) {
  int upcoming = 0;
  if (context.thread() == 0) {
    upcoming = context.atomic_add(net.queue, net.taken);
    for (int stage = 0; stage < net.stage_count; stage++) context.store32((kLists + stage * kListWords) * 4, 0);
  }
  for (;;) {
    if (context.thread() == 0) choose(context, net, upcoming);
    context.sync();
    const unsigned int stage = context.load32(kStageWord * 4), present = context.load32(kPresentWord * 4);
    if (stage >= static_cast<unsigned int>(net.stage_count)) return;
    const unsigned int stops = run_stage(context, net, stage, present);
    if (context.thread() == 0) retire(context, net, stage, present, stops);
  }
}

}  // namespace fastcascade
