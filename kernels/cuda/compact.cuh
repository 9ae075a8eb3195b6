// Compaction of the active set: an index list, feature rows in place, or a gather into a bucket.
// Each block sums the counts of the blocks before its own. There are no atomics, so the result is deterministic.
// Definition: compact_index and fill_holes in kernels/reference.py.
#pragma once

#include "context.cuh"

namespace fastcascade {

// Sum of block_counts[0 … end), computed by the whole block. `partial` is shared memory, one int per thread.
template <class Context>
FC_FUNCTION int survivors_before(Context& context, const int* block_counts, int end, int* partial) {
  int sum = 0;
  for (int i = context.thread(); i < end; i += context.threads()) sum += block_counts[i];
  partial[context.thread()] = sum;
  context.sync();
  int total = 0;
  for (int i = 0; i < context.threads(); i++) total += partial[i];
  context.sync();  // the next call writes `partial` again
  return total;
}

// The number of survivors before the thread's row within its block, of kRows threads. Other threads may still read
// `flags` when one returns.
template <class Context>
FC_FUNCTION int rank_in_block(Context& context, int stays, int* flags) {
  flags[context.thread()] = stays;
  context.sync();
  int rank = 0;
  for (int i = 0; i < context.thread(); i++) rank += flags[i];
  return rank;
}

FC_FUNCTION int blocks_of(int n) { return (n + kRows - 1) / kRows; }

// Blocks of kRows threads; `shared` holds kRows ints.
template <class Context>
FC_FUNCTION void compact_index(Context& context, const int* index, const int* count, const signed char* keep,
                               const int* block_counts, int* out_index, int* out_count, int* shared) {
  const int n = count[0];
  const int row = context.block() * kRows + context.thread();
  if (context.block() == 0) {
    const int total = survivors_before(context, block_counts, blocks_of(n), shared);
    if (context.thread() == 0) out_count[0] = total;
  }
  if (context.block() * kRows >= n) return;
  const int stays = row < n ? keep[row] : 0;
  const int base = survivors_before(context, block_counts, context.block(), shared);
  const int rank = rank_in_block(context, stays, shared);
  if (stays) out_index[base + rank] = index[row];
}

// List the stopped rows below m (holes) and the survivors from m on (tail), both in order, where m rows survive.
// Blocks of kRows threads.
template <class Context>
FC_FUNCTION void plan_holes(Context& context, const int* count, const signed char* keep, const int* block_counts,
                            int* holes, int* tail, int* moves, int* out_count, int* shared) {
  const int n = count[0];
  if (context.block() > 0 && context.block() * kRows >= n) return;
  const int row = context.block() * kRows + context.thread();
  const int m = survivors_before(context, block_counts, blocks_of(n), shared);
  const int cut = m / kRows;  // the block of row m
  const int cut_row = cut * kRows + context.thread();
  const int in_cut = cut_row < m ? keep[cut_row] : 0;
  shared[context.thread()] = in_cut;
  context.sync();
  int below = 0;  // survivors that stay in place
  for (int i = 0; i < kRows; i++) below += shared[i];
  context.sync();
  below += survivors_before(context, block_counts, cut, shared);

  const int stays = row < n ? keep[row] : 0;
  const int base = survivors_before(context, block_counts, context.block(), shared);
  const int rank = base + rank_in_block(context, stays, shared);
  if (row < m && !stays) holes[row - rank] = row;
  if (row >= m && stays) tail[rank - below] = row;
  if (context.block() == 0 && context.thread() == 0) {
    out_count[0] = m;
    moves[0] = m - below;
  }
}

// rows[holes[i]] = rows[tail[i]], in any order: sources and destinations are disjoint.
template <class Context, class Word>
FC_FUNCTION void move_rows(Context& context, Word* rows, int* index, const int* holes, const int* tail,
                           const int* moves, long long words) {
  for (int i = context.block(); i < moves[0]; i += context.blocks()) {
    const Word* source = rows + tail[i] * words;
    Word* hole = rows + holes[i] * words;
    for (long long w = context.thread(); w < words; w += context.threads()) hole[w] = source[w];
    if (context.thread() == 0) index[holes[i]] = index[tail[i]];
  }
}

// bucket[i] = source[index[chunk·size + i]]; zeros beyond the active rows.
template <class Context, class Word>
FC_FUNCTION void gather_rows(Context& context, const Word* source, const int* index, const int* count, const int* chunk,
                             Word* bucket, int* bucket_index, int* bucket_count, int size, long long words) {
  const int first = chunk[0] * size;
  const int left = count[0] - first;
  const int n = left < 0 ? 0 : left < size ? left : size;
  for (int i = context.block(); i < size; i += context.blocks()) {
    const long long origin = i < n ? index[first + i] : 0;
    for (long long w = context.thread(); w < words; w += context.threads())
      bucket[i * words + w] = i < n ? source[origin * words + w] : Word{};
    if (context.thread() == 0) bucket_index[i] = static_cast<int>(origin);
  }
  if (context.block() == 0 && context.thread() == 0) bucket_count[0] = n;
}

}  // namespace fastcascade
