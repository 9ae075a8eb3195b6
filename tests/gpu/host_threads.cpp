// The CUDA kernels on the CPU: the files of kernels/cuda compiled by a C++ compiler, with one OS thread for each
// CUDA thread of a block. Blocks run one after another, in either order, since a kernel may count on neither.
// Under ThreadSanitizer a missing barrier is a data race; a launch can be told to leave one out.
#include <barrier>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "context.cuh"

#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, so its threads share it with nobody else

namespace fastcascade {

// What the threads of one warp exchange in a shuffle. Two sets of slots by turns: when a set is written again,
// every thread has passed the shuffle between, and so has read what it held.
struct Warp {
  std::barrier<> reached{kWarp};
  float slot[2][kWarp];
};

struct Block {
  Block(int index, int blocks, int threads, int left_out)
      : index(index),
        blocks(blocks),
        threads(threads),
        left_out(left_out),
        reached(threads),
        warps(new Warp[threads / kWarp]) {}
  int index, blocks, threads, left_out;
  std::barrier<> reached;
  std::unique_ptr<Warp[]> warps;
};

thread_local Block* current_block;
thread_local int current_thread;
thread_local int barriers;  // that this thread has come to
thread_local int shuffles;

struct DeviceContext {
  int thread() const { return current_thread; }
  int threads() const { return current_block->threads; }
  int lane() const { return current_thread % kWarp; }
  int warp() const { return current_thread / kWarp; }
  int warps() const { return current_block->threads / kWarp; }
  int block() const { return current_block->index; }
  int blocks() const { return current_block->blocks; }

  void sync() const {
    if (barriers++ != current_block->left_out) current_block->reached.arrive_and_wait();
  }

  template <class T>
  T shuffle_xor(T value, int mask) const {
    static_assert(sizeof value == sizeof(float));
    Warp& own = current_block->warps[warp()];
    float* const slot = own.slot[shuffles++ % 2];
    std::memcpy(&slot[lane()], &value, sizeof value);
    own.reached.arrive_and_wait();
    std::memcpy(&value, &slot[lane() ^ mask], sizeof value);
    return value;
  }
};

}  // namespace fastcascade

#include "compact.cu"
#include "exit_head.cu"

namespace {

// Run a kernel as cuLaunchKernel does: `arguments` points to one pointer per argument.
template <class... Types>
void run(void (*kernel)(Types...), void** arguments, int blocks, int threads, bool descending, int left_out) {
  const auto call = [&]<std::size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<Types*>(arguments[I])...); };
  for (int i = 0; i < blocks; i++) {
    fastcascade::Block block(descending ? blocks - 1 - i : i, blocks, threads, left_out);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; t++)
      running.emplace_back([&, t] {
        fastcascade::current_block = &block;
        fastcascade::current_thread = t;
        call(std::index_sequence_for<Types...>{});
      });
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace

// `left_out` is the barrier that all threads run through, counted from 0 in each block, or -1. Returns 0, or 1 for
// a name that is no kernel.
extern "C" int launch(const char* name, void** arguments, int blocks, int threads, int descending, int left_out) {
  const std::string wanted = name;
#define KERNEL(kernel)                                             \
  if (wanted == #kernel) {                                         \
    run(kernel, arguments, blocks, threads, descending, left_out); \
    return 0;                                                      \
  }
  KERNEL(exit_head_f32)
  KERNEL(exit_head_f16)
  KERNEL(exit_head_bf16)
  KERNEL(compact_index_kernel)
  KERNEL(plan_holes_kernel)
  KERNEL(move_rows_quad)
  KERNEL(move_rows_byte)
  KERNEL(gather_rows_quad)
  KERNEL(gather_rows_byte)
#undef KERNEL
  return 1;
}
