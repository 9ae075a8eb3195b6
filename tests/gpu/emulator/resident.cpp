// The resident kernel in the emulator, for tests/helpers/resident_emulator.py: a block for each OS thread asked for.
#include <mutex>
#include <thread>

#include "emulator.hpp"

using namespace fastcascade;

extern "C" void run_cascade_emulated(const ResidentCascade* net, int shared_bytes, int blocks, const Options* options,
                                     Counts* counts) {
  std::vector<std::thread> threads;
  std::mutex mutex;
  for (int i = 0; i < blocks; i++)
    threads.emplace_back([&, i] {
      Block block(*options, (shared_bytes + 15) / 16 * 16);
      block.run([&](int thread) {
        EmulatedContext context(block, thread, i);
        run_cascade(context, *net);
      });
      const std::lock_guard<std::mutex> lock(mutex);
      for (std::size_t k = 0; k < sizeof(Counts) / sizeof(long long); k++)
        reinterpret_cast<long long*>(counts)[k] += reinterpret_cast<const long long*>(&block.counts)[k];
    });
  for (auto& thread : threads) thread.join();
}

extern "C" void sizes_of_structs(int* out) {
  out[0] = sizeof(ResidentLayer), out[1] = sizeof(ResidentExit), out[2] = sizeof(ResidentCascade);
}

// One mma on fragments: a (32 lanes, 4), b (32, 2), d (32, 4).
extern "C" void mma_emulated(const unsigned int* a, const unsigned int* b, float* d) {
  Block block(Options{0, 0, -1, 0, 0}, 64);
  block.run([&](int thread) {
    EmulatedContext context(block, thread, 0);
    const int lane = context.lane();
    unsigned int fragment[4];
    float sum[4] = {};
    for (int i = 0; i < 4; i++) fragment[i] = a[lane * 4 + i];
    context.mma(sum, fragment, b[lane * 2], b[lane * 2 + 1]);
    for (int i = 0; context.warp() == 0 && i < 4; i++) d[lane * 4 + i] = sum[i];
  });
}

// One ldmatrix.x4 on 2 KiB of shared memory: 32 byte offsets, fragments (32, 4); returns its passes.
extern "C" int load_matrix_emulated(const unsigned char* memory, const int* places, unsigned int* fragments) {
  Block block(Options{0, 0, -1, 0, 0}, 2048);
  std::memcpy(block.memory.data(), memory, 2048);
  block.run([&](int thread) {
    EmulatedContext context(block, thread, 0);
    if (context.warp() > 0) return;
    unsigned int a[4];
    context.load_matrix(a, places[context.lane()]);
    for (int i = 0; i < 4; i++) fragments[context.lane() * 4 + i] = a[i];
  });
  return static_cast<int>(block.counts.load_matrix_passes);
}
