// Conditional nodes of CUDA graphs: decides on the device whether a WHILE node runs its body once more.
// cudaGraphSetConditional is declared by hand: its header belongs to the toolkit, which is not installed with
// the run-time compiler. The driver resolves it when the module is loaded.

typedef unsigned long long ConditionalHandle;
extern "C" __device__ void cudaGraphSetConditional(ConditionalHandle handle, unsigned int value);

// Before the loop: chunk 0, and a body only if any row is active.
extern "C" __global__ void begin_chunks(const int* count, int* chunk, ConditionalHandle handle) {
  chunk[0] = 0;
  cudaGraphSetConditional(handle, count[0] > 0);
}

// At the end of the body: the next chunk of `size` rows, and again while rows are left.
extern "C" __global__ void next_chunk(const int* count, int* chunk, int size, ConditionalHandle handle) {
  const int next = chunk[0] + 1;
  chunk[0] = next;
  cudaGraphSetConditional(handle, static_cast<long long>(next) * size < count[0]);
}
