// Runs CUDA kernels on the CPU: enough of CUDA C++ for g++ to compile csrc/cuda, and an engine that keeps its rules.
//
// Every thread of a block is a fiber, which runs until it waits for others or ends; blocks run one after another, and
// global memory is plain memory. So that a missing barrier shows, which thread goes first changes from block to block:
// the lowest, the highest, or one of a random order. It always runs as far ahead of the others as they let it.
//
// Breaking a rule throws std::runtime_error: a mask that lacks its own thread or the one it reads from, threads that
// meet in different shuffles, a barrier that a thread of the block never reaches. Memory is left to sanitizers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __shared__ static  // one block runs at a time

namespace cuda_on_host {

constexpr unsigned kWarp = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The block that runs, one for the process.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& kernel) {
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    body = &kernel;
    count = threads;
    at_barrier = 0;
    broken.clear();
    order.resize(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (turn % 3 == 1) std::reverse(order.begin(), order.end());
    if (turn % 3 == 2) std::shuffle(order.begin(), order.end(), random);
    ++turn;
    for (unsigned rank = 0; rank < threads; ++rank) start(order[rank], rank);
    unsigned ended = 0;
    while (!ready.empty()) {
      current = order[*ready.begin()];
      ready.erase(ready.begin());
      resume();
      ended += fibers[current]->ended;
      if (!broken.empty()) break;
    }
    ready.clear();
    if (broken.empty() && ended < threads) broken = "threads wait for others that never come";
    if (!broken.empty()) throw std::runtime_error(broken);
  }

  void barrier() {
    if (++at_barrier < count) return wait();
    at_barrier = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (i != current) wake(i);
    }
  }

  uint64_t shuffle_xor(uint32_t mask, uint64_t value, unsigned reach) {
    const unsigned lane = current % kWarp, first = current - lane;
    const auto in_mask = [&](unsigned l) { return l < kWarp && (mask >> l & 1) != 0; };
    if (!in_mask(lane)) fail("a shuffle's mask lacks the thread that calls it");
    if (!in_mask(lane ^ reach)) fail("a shuffle reads from a thread that its mask lacks");
    fibers[current]->shuffle = {true, mask, reach, value};
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!in_mask(l)) continue;
      if (first + l >= count) fail("a shuffle's mask names a thread beyond the block");
      const Shuffle& other = fibers[first + l]->shuffle;
      if (!other.waiting) {  // the last of the mask to come finds all the others here
        wait();
        return fibers[current]->received;
      }
      if (other.mask != mask || other.reach != reach) fail("threads of one mask meet in different shuffles");
    }
    for (unsigned l = 0; l < kWarp; ++l) {
      if (in_mask(l)) fibers[first + l]->received = fibers[first + (l ^ reach)]->shuffle.value;
    }
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!in_mask(l)) continue;
      fibers[first + l]->shuffle = {};
      if (l != lane) wake(first + l);
    }
    return fibers[current]->received;
  }

 private:
  struct Shuffle {
    bool waiting = false;
    uint32_t mask = 0;
    unsigned reach = 0;
    uint64_t value = 0;
  };
  static constexpr size_t kStack = 1 << 16;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    unsigned rank = 0;
    bool ended = false;
    Shuffle shuffle;
    uint64_t received = 0;
  };

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned> order;  // by rank: of the threads that can run, the first in it does
  std::set<unsigned> ready;     // their ranks
  ucontext_t engine;
  const std::function<void()>* body = nullptr;
  std::string broken;
  unsigned count = 0, current = 0, at_barrier = 0, turn = 0;
  std::mt19937 random{1};

  void start(unsigned i, unsigned rank) {
    Fiber& f = *fibers[i];
    f.rank = rank;
    f.ended = false;
    f.shuffle = {};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &engine;
    makecontext(&f.context, &Block::enter, 0);
    wake(i);
  }
  static void enter();
  void resume();
  void wait() { swapcontext(&fibers[current]->context, &engine); }
  void wake(unsigned i) { ready.insert(fibers[i]->rank); }
  // No exception leaves a fiber: the engine throws, and never comes back here.
  void fail(const char* what) {
    broken = "thread " + std::to_string(current) + ": " + what;
    wait();
  }
};

inline Block block;

}  // namespace cuda_on_host

inline cuda_on_host::Index threadIdx, blockIdx, blockDim, gridDim;

inline void cuda_on_host::Block::resume() {
  threadIdx.x = current;
  swapcontext(&engine, &fibers[current]->context);
}

inline void cuda_on_host::Block::enter() {
  (*block.body)();
  block.fibers[block.current]->ended = true;
}

inline void __syncthreads() { cuda_on_host::block.barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int reach) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = cuda_on_host::block.shuffle_xor(mask, bits, static_cast<unsigned>(reach));
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

namespace cuda_on_host {

// kernel<<<blocks, threads>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx = {i, 0, 0};
    block.run(threads, [&] { kernel(arguments...); });
  }
}

}  // namespace cuda_on_host
