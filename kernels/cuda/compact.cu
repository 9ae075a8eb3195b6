// Entry points of compaction. Rows move as 16-byte words if size and alignment allow, as bytes otherwise.
#include "compact.cuh"

using namespace fastcascade;

extern "C" __global__ void __launch_bounds__(kRows)
    compact_index_kernel(const int* index, const int* count, const signed char* keep, const int* block_counts,
                         int* out_index, int* out_count) {
  __shared__ int shared[kRows];
  DeviceContext context;
  compact_index(context, index, count, keep, block_counts, out_index, out_count, shared);
}

extern "C" __global__ void __launch_bounds__(kRows)
    plan_holes_kernel(const int* count, const signed char* keep, const int* block_counts, int* holes, int* tail,
                      int* moves, int* out_count) {
  __shared__ int shared[kRows];
  DeviceContext context;
  plan_holes(context, count, keep, block_counts, holes, tail, moves, out_count, shared);
}

#define ROWS(suffix, Word)                                                                                         \
  extern "C" __global__ void __launch_bounds__(256) move_rows_##suffix(                                            \
      Word* rows, int* index, const int* holes, const int* tail, const int* moves, long long words) {              \
    DeviceContext context;                                                                                         \
    move_rows(context, rows, index, holes, tail, moves, words);                                                    \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                                \
      gather_rows_##suffix(const Word* source, const int* index, const int* count, const int* chunk, Word* bucket, \
                           int* bucket_index, int* bucket_count, int size, long long words) {                      \
    DeviceContext context;                                                                                         \
    gather_rows(context, source, index, count, chunk, bucket, bucket_index, bucket_count, size, words);            \
  }

ROWS(quad, Quad)
ROWS(byte, unsigned char)
