// Entry points of the exit head, one per type of logits. Asking for three blocks per multiprocessor limits the
// compiler to about 48 registers. Occupancy matters, because most of a row's time is latency of shuffles and loads.
#include "exit_head.cuh"

using namespace fastcascade;

#define ENTRY(name, Scalar)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 3) name(const ExitArguments arguments, const Scalar* logits) { \
    __shared__ int stays[kRows];                                                                                   \
    DeviceContext context;                                                                                         \
    exit_head(context, arguments, logits, stays);                                                                  \
  }

ENTRY(exit_head_f32, float)
ENTRY(exit_head_f16, Half)
ENTRY(exit_head_bf16, BFloat16)
