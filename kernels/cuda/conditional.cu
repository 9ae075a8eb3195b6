// Kernels around the body of a WHILE node in a CUDA graph: they decide on the device whether it runs once more.
// cudaGraphSetConditional is declared by hand, because its header comes with the toolkit and not with NVRTC. The
// driver resolves it when the module is loaded.

typedef unsigned long long ConditionalHandle;
extern "C" __device__ void cudaGraphSetConditional(ConditionalHandle handle, unsigned int value);

// Before the loop: start at chunk 0, and enter the body only if any row is active.
extern "C" __global__ void begin_chunks(const int* count, int* chunk, ConditionalHandle handle) {
  chunk[0] = 0;
  cudaGraphSetConditional(handle, count[0] > 0);
}

// At the end of the body: advance to the next chunk of `size` rows, and repeat while rows are left.
extern "C" __global__ void next_chunk(const int* count, int* chunk, int size, ConditionalHandle handle) {
  const int next = chunk[0] + 1;
  chunk[0] = next;
  cudaGraphSetConditional(handle, static_cast<long long>(next) * size < count[0]);
}
