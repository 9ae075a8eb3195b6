// A block of CUDA threads on the host, for kernels that use tensor cores and shared memory.
//
// Every CUDA thread is a fiber; one OS thread runs one block. ldmatrix, mma.sync and shuffles exchange fragments among
// the 32 fibers of a warp exactly as the PTX ISA lays them out. Shared memory starts as NaN. Beside results it reports
//   races: two threads touch a word of shared memory between two barriers and one of them writes. That does not depend
//          on the order in which fibers run. Threads of one warp count, too: __syncwarp and shuffles order nothing
//          here.
//   counts: of warp-wide instructions, and of the passes that shared memory takes for them (bank conflicts);
//   a deadlock: threads that wait for each other at different places.
// A barrier can be left out and mma's B operand swapped: planted faults.
#pragma once

#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 instructions"
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "resident.cuh"

// Saves the registers that a call preserves, leaves the stack pointer in *from, and takes up `to`'s. ucontext's
// swapcontext does the same with two system calls, which would be most of the time.
extern "C" void switch_fiber(void** from, void* to);
asm(R"(
.text
.type switch_fiber, @function
switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_fiber, .-switch_fiber
)");

namespace fastcascade {

inline float half_value(unsigned int bits) {
  _Float16 h;
  const auto b = static_cast<std::uint16_t>(bits);
  std::memcpy(&h, &b, 2);
  return static_cast<float>(h);
}
inline unsigned int half_bits(float value) {
  const auto h = static_cast<_Float16>(value);
  std::uint16_t b;
  std::memcpy(&b, &h, 2);
  return b;
}

struct Counts {
  long long mma, load_matrix, load_matrix_passes, shared, shared_passes, wide_loads, barriers, races, deadlocks;
};

struct Options {
  int backward;      // the last warp runs first
  int trace;         // count passes of shared memory
  int left_out;      // the barrier that all threads run through, counted from 0 in each block; −1: none
  int stop_at_race;  // what follows a race may be anything
  int swap_b;        // mma takes b1 for b0
};

class Block {
 public:
  static constexpr int kThreads = kBlockThreads;

  Block(const Options& options, int shared_bytes)
      : memory(shared_bytes, 0xff), options_(options), shadow_(shared_bytes / 4, Shadow{-1, -1, -1, -1}) {
    for (auto& stack : stacks_) stack.resize(kStackBytes);
  }

  // `body` is called with a thread's number, on each fiber.
  template <class Body>
  void run(Body body) {
    struct Start {
      static void enter() {
        Block* const block = running_;
        (*static_cast<Body*>(block->body_))(block->current_);
        block->finish();
      }
    };
    body_ = &body;
    running_ = this;
    for (int i = 0; i < kThreads; i++) {
      state_[i] = kReady;
      auto top = reinterpret_cast<std::uintptr_t>(stacks_[i].data() + kStackBytes) & ~std::uintptr_t{15};
      auto* stack = reinterpret_cast<void**>(top);
      *--stack = nullptr;  // where enter() would return to; also keeps its stack aligned
      *--stack = reinterpret_cast<void*>(&Start::enter);
      for (int saved = 0; saved < 6; saved++) *--stack = nullptr;
      fibers_[i] = stack;
    }
    current_ = 0;
    current_ = pick();
    switch_fiber(&main_, fibers_[current_]);
    flush();
  }

  void sync() {
    if (barriers_passed_[current_]++ == options_.left_out) return;
    if (++at_barrier_ == kThreads) {
      at_barrier_ = 0;
      epoch_++;
      counts.barriers++;
      flush();
      for (auto& state : state_) state = kReady;
      return;
    }
    state_[current_] = kAtBarrier;
    switch_to(pick());
  }

  struct Exchange {
    alignas(16) unsigned char in[kWarp][32];
    alignas(16) unsigned char out[kWarp][16];
    int arrived = 0, done = 0;
  };

  // A warp-wide instruction: every lane leaves its operands; the last one computes for all.
  template <class Compute>
  void warp_collective(const void* in, int in_size, void* out, int out_size, Compute compute) {
    const int thread = current_, warp = thread / kWarp, lane = thread % kWarp;
    Exchange& exchange = exchange_[warp];
    std::memcpy(exchange.in[lane], in, in_size);
    const int mine = exchange.done;
    if (++exchange.arrived == kWarp) {
      exchange.arrived = 0;
      compute(exchange);
      exchange.done++;
    } else {
      while (exchange.done == mine) switch_to(warp * kWarp + (current_ + 1) % kWarp);
    }
    std::memcpy(out, exchange.out[lane], out_size);
    if (options_.trace) serial_[thread] = 0, group_[thread]++;
  }

  // An access to shared memory by the running thread.
  void access(int offset, int bytes, bool write) {
    touch(offset, bytes, write);
    if (options_.trace)
      traced_[std::make_tuple(current_ / kWarp, group_[current_], serial_[current_]++)].push_back({offset, bytes});
  }

  void touch(int offset, int bytes, bool write) {
    for (int word = offset / 4; word < (offset + bytes) / 4; word++) {
      Shadow& s = shadow_[word];
      const bool wrote = s.write_epoch == epoch_ && s.writer != current_;
      const bool read = s.read_epoch == epoch_ && s.reader != current_;
      if (wrote || (write && read)) {
        counts.races++;
        if (options_.stop_at_race) abandon();
      }
      if (write) {
        s.write_epoch = epoch_;
        s.writer = current_;
      } else {
        s.reader = read ? kSeveral : current_;
        s.read_epoch = epoch_;
      }
    }
  }

  // Passes of shared memory for one instruction: 32 banks of 4 bytes; lanes with the same word share an access;
  // 16-byte accesses go in phases of 8 lanes.
  static int passes(const std::vector<std::pair<int, int>>& accesses) {
    int total = 0;
    const std::size_t phase = accesses[0].second == 16 ? 8 : 32;
    for (std::size_t begin = 0; begin < accesses.size(); begin += phase) {
      std::map<int, std::map<int, bool>> banks;
      for (std::size_t i = begin; i < accesses.size() && i < begin + phase; i++)
        for (int word = accesses[i].first / 4; word < (accesses[i].first + accesses[i].second) / 4; word++)
          banks[word % 32][word] = true;
      std::size_t most = 0;
      for (const auto& bank : banks) most = bank.second.size() > most ? bank.second.size() : most;
      total += static_cast<int>(most);
    }
    return total;
  }

  int thread() const { return current_; }
  bool swaps_b() const { return options_.swap_b != 0; }

  std::vector<unsigned char> memory;
  Counts counts{};

 private:
  enum State { kReady, kAtBarrier, kDone };
  static constexpr int kSeveral = -2;
  static constexpr int kStackBytes = 96 << 10;
  struct Shadow {
    int write_epoch, writer, read_epoch, reader;
  };

  // A ready thread: of this warp first, then by the order of warps; −1 if there is none.
  int pick() const {
    const int warp = current_ / kWarp;
    for (int i = 1; i <= kWarp; i++) {
      const int thread = warp * kWarp + (current_ + i) % kWarp;
      if (state_[thread] == kReady) return thread;
    }
    for (int i = 0; i < kThreads; i++) {
      const int next = options_.backward ? kBlockWarps - 1 - i / kWarp : i / kWarp;
      if (state_[next * kWarp + i % kWarp] == kReady) return next * kWarp + i % kWarp;
    }
    return -1;
  }
  void switch_to(int to) {
    if (to < 0 || state_[to] != kReady) {
      counts.deadlocks++;
      abandon();
    }
    const int from = current_;
    current_ = to;
    switch_fiber(&fibers_[from], fibers_[to]);
  }
  void abandon() {  // the fibers stay where they are
    void* unused;
    switch_fiber(&unused, main_);
  }
  void finish() {
    state_[current_] = kDone;
    const int to = pick();
    if (to < 0) {
      for (const auto state : state_) counts.deadlocks += state == kAtBarrier;
      abandon();
    }
    switch_to(to);
  }
  void flush() {
    if (!options_.trace) return;
    for (const auto& [key, accesses] : traced_) {
      counts.shared++;
      counts.shared_passes += passes(accesses);
    }
    traced_.clear();
    for (auto& serial : serial_) serial = 0;
    for (auto& group : group_) group = 0;
  }

  static inline thread_local Block* running_ = nullptr;
  Options options_;
  void* body_ = nullptr;
  void* main_ = nullptr;
  void* fibers_[kThreads] = {};
  std::vector<unsigned char> stacks_[kThreads];
  State state_[kThreads] = {};
  int barriers_passed_[kThreads] = {};
  Exchange exchange_[kBlockWarps];
  std::vector<Shadow> shadow_;
  // Accesses that lanes of a warp make at the same point: by warp, warp-wide instruction before it, number since.
  std::map<std::tuple<int, int, int>, std::vector<std::pair<int, int>>> traced_;
  int serial_[kThreads] = {}, group_[kThreads] = {};
  int current_ = 0, at_barrier_ = 0, epoch_ = 0;
};

// The context of resident.cuh.
class EmulatedContext {
 public:
  EmulatedContext(Block& block, int thread, int number) : block_(block), thread_(thread), number_(number) {}
  int thread() const { return thread_; }
  int threads() const { return kBlockThreads; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }
  int warps() const { return kBlockWarps; }
  int block() const { return number_; }
  void sync() { block_.sync(); }
  void obscure_thread() {}
  void converge() {}

  template <class T>
  [[gnu::noinline]] T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) == 4, "shuffles move 32 bits");
    T result;
    block_.warp_collective(&value, 4, &result, 4, [&](Block::Exchange& e) {
      for (int lane = 0; lane < kWarp; lane++) std::memcpy(e.out[lane], e.in[lane ^ mask], 4);
    });
    return result;
  }

  // Lanes 8i … 8i + 7 give the rows of matrix i; lane l gets elements 2(l % 4) and + 1 of row l / 4 of each.
  [[gnu::noinline]] void load_matrix(unsigned int (&a)[4], int offset) {
    check(offset, 16);
    block_.touch(offset, 16, false);
    block_.warp_collective(&offset, 4, a, 16, [&](Block::Exchange& e) {
      std::vector<std::pair<int, int>> accesses(kWarp, {0, 16});
      for (int l = 0; l < kWarp; l++) std::memcpy(&accesses[l].first, e.in[l], 4);
      for (int l = 0; l < kWarp; l++)
        for (int i = 0; i < 4; i++)
          std::memcpy(e.out[l] + i * 4, &block_.memory[accesses[i * 8 + l / 4].first + l % 4 * 4], 4);
      block_.counts.load_matrix++;
      block_.counts.load_matrix_passes += Block::passes(accesses);
    });
  }

  // m16n8k16, row.col, f32 += f16 · f16. Lane l, g = l / 4, t = l % 4:
  //   a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8), two columns each
  //   b0 (2t, g)  b1 (2t + 8, g), two rows each;  d0 d1 (g, 2t)  d2 d3 (g + 8, 2t), two columns
  [[gnu::noinline]] void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    struct Operands {
      unsigned int a[4], b[2];
    } own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    if (block_.swaps_b()) std::swap(own.b[0], own.b[1]);
    float product[4];
    block_.warp_collective(&own, sizeof own, product, 16, [&](Block::Exchange& e) {
      float A[16][16], B[16][8], D[16][8] = {};
      for (int l = 0; l < kWarp; l++) {
        Operands o;
        std::memcpy(&o, e.in[l], sizeof o);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
          for (int k = 0; k < 2; k++) A[g + i % 2 * 8][t * 2 + k + i / 2 * 8] = half_value(o.a[i] >> k * 16);
        for (int i = 0; i < 2; i++)
          for (int k = 0; k < 2; k++) B[t * 2 + k + i * 8][g] = half_value(o.b[i] >> k * 16);
      }
      for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
          for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * B[k][n];
      for (int l = 0; l < kWarp; l++) {
        const int g = l / 4, t = l % 4;
        const float out[4] = {D[g][t * 2], D[g][t * 2 + 1], D[g + 8][t * 2], D[g + 8][t * 2 + 1]};
        std::memcpy(e.out[l], out, 16);
      }
      block_.counts.mma++;
    });
    for (int i = 0; i < 4; i++) d[i] += product[i];
  }

  unsigned int load32(int offset) { return load<unsigned int>(offset); }
  void store32(int offset, unsigned int value) { store(offset, value); }
  Quad load128(int offset) { return load<Quad>(offset); }
  void store128(int offset, const Quad& value) { store(offset, value); }
  float load_float(int offset) { return load<float>(offset); }
  void store_float(int offset, float value) { store(offset, value); }
  const float* floats(int offset) { return reinterpret_cast<const float*>(&block_.memory[offset]); }
  int atomic_add(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST); }
  Quad load_global(const Quad* from) {
    if (lane() == 0) block_.counts.wide_loads++;
    return *from;
  }
  template <bool kRelu>
  unsigned int pack(float low, float high) const {
    if (kRelu) low = low < 0 ? 0.0f : low, high = high < 0 ? 0.0f : high;  // keeps NaN, as cvt.relu does
    return half_bits(low) | half_bits(high) << 16;
  }
  void unpack(unsigned int value, float& low, float& high) const {
    low = half_value(value & 0xffff);
    high = half_value(value >> 16);
  }
  [[gnu::noinline]] unsigned int max2(unsigned int a, unsigned int b) const {
    unsigned int result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const float x = half_value(a >> shift), y = half_value(b >> shift);
      result |= (x != x || (x > y && y == y) ? a >> shift & 0xffff : b >> shift & 0xffff) << shift;  // NaN wins
    }
    return result;
  }

 private:
  template <class T>
  [[gnu::noinline]] T load(int offset) {
    check(offset, sizeof(T));
    block_.access(offset, sizeof(T), false);
    T value;
    std::memcpy(&value, &block_.memory[offset], sizeof value);
    return value;
  }
  template <class T>
  [[gnu::noinline]] void store(int offset, const T& value) {
    check(offset, sizeof(T));
    block_.access(offset, sizeof(T), true);
    std::memcpy(&block_.memory[offset], &value, sizeof value);
  }
  void check(int offset, int size) const {
    if (offset >= 0 && offset % size == 0 && offset + size <= static_cast<int>(block_.memory.size())) return;
    std::fprintf(stderr, "shared memory: %d bytes at %d\n", size, offset);
    std::abort();
  }

  Block& block_;
  int thread_, number_;
};

}  // namespace fastcascade
