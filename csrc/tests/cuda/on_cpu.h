// Runs the kernels of plain .cu files on the CPU, without a GPU and without the CUDA toolkit.
//
// A .cu file compiled as C++ with this folder first on the include path finds its <cuda_runtime.h>, <cuda_bf16.h> and <cuda_fp16.h> here. Blocks
// run one after the other; the threads of a block are fibers, each of which runs until it waits: at a barrier or in a warp's exchange. So results
// are those of a device as long as nothing depends on the order of the threads between two barriers, and that is tested by running them
// ascending, descending and shuffled (set_order). What a device would answer with a hang or with garbage is an error here: a barrier that some
// threads never reach, lanes of a warp that meet in different exchanges, shared memory that is read before it was written (it holds NaN).
// Only what the kernels of csrc use is here; warps are whole (blocks of a multiple of 32 threads, masks of all lanes).
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CVMK_CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace on_cpu {

enum class Wait { kNothing, kWarp, kBlock, kDone };
enum class Order { kAscending, kDescending, kShuffled };

constexpr size_t kStack = 128 * 1024;
constexpr unsigned char kGuard = 0xA5;  // of the last bytes of a stack

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  Wait wait;
  bool started;
  unsigned exchanges;
  void* sanitizer;  // its name for the fiber's stack
};

struct Warp {
  uint64_t values[2][32];  // of this exchange and of the one before, which slower lanes still read
  int arrived;
  const char* kind;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  std::function<void()> body;
  std::string error;
  Order chosen = Order::kAscending;
  unsigned count = 0, current = 0, at_barrier = 0;
  char* shared = nullptr;
  ucontext_t scheduler;
  jmp_buf scheduler_here;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
};
inline Machine machine;

inline void set_order(Order order) { machine.chosen = order; }
inline void* shared_memory() { return machine.shared; }

// -- switching: contexts are made by ucontext; jumps between them cost no system call. The address sanitizer wants to know of every switch.
#if defined(__SANITIZE_ADDRESS__)
inline void to_thread(Thread& t) {
  __sanitizer_start_switch_fiber(&machine.scheduler_sanitizer, t.stack.get(), kStack);
  swapcontext(&machine.scheduler, &t.start);
  __sanitizer_finish_switch_fiber(machine.scheduler_sanitizer, nullptr, nullptr);
}
inline void to_scheduler(Thread& t) {
  __sanitizer_start_switch_fiber(t.wait == Wait::kDone ? nullptr : &t.sanitizer, machine.scheduler_stack, machine.scheduler_size);
  swapcontext(&t.start, &machine.scheduler);
  __sanitizer_finish_switch_fiber(t.sanitizer, &machine.scheduler_stack, &machine.scheduler_size);
}
inline void arrived_first() { __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size); }
#else
inline void to_thread(Thread& t) {
  if (_setjmp(machine.scheduler_here) != 0) return;
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  setcontext(&t.start);
}
inline void to_scheduler(Thread& t) {
  if (_setjmp(t.here) == 0) _longjmp(machine.scheduler_here, 1);
}
inline void arrived_first() {}
#endif

inline void run_thread() {
  arrived_first();
  machine.body();
  Thread& t = machine.threads[machine.current];
  t.wait = Wait::kDone;
  to_scheduler(t);
}

[[noreturn]] inline void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = "thread " + std::to_string(machine.current) + ": " + what;
  Thread& t = machine.threads[machine.current];
  t.wait = Wait::kDone;
  to_scheduler(t);
  abort();
}

inline void barrier() {
  Machine& m = machine;
  m.threads[m.current].wait = Wait::kBlock;
  if (++m.at_barrier == m.count) {
    m.at_barrier = 0;
    for (unsigned i = 0; i < m.count; ++i) m.threads[i].wait = Wait::kNothing;
  }
  to_scheduler(m.threads[m.current]);
}

// Every lane's value, once all lanes of the warp have come to the exchange.
inline const uint64_t* exchange(const char* kind, unsigned mask, uint64_t value) {
  Machine& m = machine;
  Thread& t = m.threads[m.current];
  Warp& w = m.warps[m.current / 32];
  if (mask != 0xFFFFFFFFu) fail(std::string(kind) + " with a mask of some lanes");
  uint64_t* values = w.values[t.exchanges++ & 1];
  values[m.current % 32] = value;
  if (w.arrived++ == 0) w.kind = kind;
  if (strcmp(w.kind, kind) != 0) fail(std::string(kind) + " where other lanes of the warp are at " + w.kind);
  if (w.arrived < 32) {
    t.wait = Wait::kWarp;
    to_scheduler(t);
    return values;
  }
  w.arrived = 0;
  const unsigned first = m.current / 32 * 32;
  for (unsigned i = first; i < first + 32; ++i) m.threads[i].wait = Wait::kNothing;
  return values;
}

inline void start(Thread& t) {
  memset(t.stack.get(), kGuard, 64);
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = t.stack.get();
  t.start.uc_stack.ss_size = kStack;
  t.start.uc_link = nullptr;
  makecontext(&t.start, &run_thread, 0);
  t.wait = Wait::kNothing;
  t.started = false;
  t.exchanges = 0;
  t.sanitizer = nullptr;
}

inline void run_block() {
  Machine& m = machine;
  for (unsigned i = 0; i < m.count; ++i) start(m.threads[i]);
  for (Warp& w : m.warps) w.arrived = 0;
  m.at_barrier = 0;
  for (;;) {
    bool moved = false, waiting = false;
    for (unsigned i : m.order) {
      Thread& t = m.threads[i];
      if (t.wait == Wait::kNothing) {
        m.current = i;
        threadIdx = {i, 0, 0};
        to_thread(t);
        moved = true;
        if (!m.error.empty()) throw std::runtime_error(std::exchange(m.error, {}));
      }
      waiting |= t.wait != Wait::kDone;
    }
    if (!waiting) break;
    if (!moved) throw std::runtime_error("threads wait at a barrier, or in an exchange, that others of their block or warp have left out");
  }
  for (unsigned i = 0; i < m.count; ++i)
    if (static_cast<unsigned char>(m.threads[i].stack[0]) != kGuard) throw std::runtime_error("a thread's stack is too small");
}

inline void run(const std::function<void()>& body, dim3 grid, dim3 block, size_t shared) {
  Machine& m = machine;
  if (block.y != 1 || block.z != 1 || block.x % 32 != 0 || block.x == 0 || block.x > 1024) throw std::runtime_error("blocks are whole warps in one dimension");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("no device launches such a grid");
  if (m.threads.size() < block.x) m.threads.resize(block.x);
  m.count = block.x;
  m.warps.resize(block.x / 32);
  m.body = body;
  m.order.resize(block.x);
  for (unsigned i = 0; i < block.x; ++i) m.order[i] = m.chosen == Order::kDescending ? block.x - 1 - i : i;
  std::mt19937 random(0);
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t at = m.chosen == Order::kDescending ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y), static_cast<unsigned>(at / grid.x / grid.y)};
    if (m.chosen == Order::kShuffled) std::shuffle(m.order.begin(), m.order.end(), random);
    const std::unique_ptr<void, decltype(&free)> memory(malloc(shared + 1), &free);
    memset(memory.get(), 0xFF, shared);
    m.shared = static_cast<char*>(memory.get());
    run_block();
  }
}

template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) >= sizeof(From), "the value does not fit");
  To to{};
  memcpy(&to, &value, sizeof(From));
  return to;
}
template <typename T>
T lane(const char* kind, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8, "a lane exchanges 8 bytes at most");
  T found;
  memcpy(&found, &exchange(kind, mask, bits<uint64_t>(value))[from], sizeof(T));
  return found;
}
inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace on_cpu

// -- what CUDA C++ has built in ----------------------------------------------------------------------------------------------------
inline void __syncthreads() { on_cpu::barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { on_cpu::exchange("__syncwarp", mask, 0); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return on_cpu::lane("__shfl_sync", mask, value, from % 32);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int from = on_cpu::lane_id() - static_cast<int>(by);
  return on_cpu::lane("__shfl_up_sync", mask, value, from < 0 ? on_cpu::lane_id() : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int from = on_cpu::lane_id() + static_cast<int>(by);
  return on_cpu::lane("__shfl_down_sync", mask, value, from > 31 ? on_cpu::lane_id() : from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return on_cpu::lane("__shfl_xor_sync", mask, value, on_cpu::lane_id() ^ with);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = on_cpu::exchange("__ballot_sync", mask, predicate != 0);
  unsigned found = 0;
  for (unsigned i = 0; i < 32; ++i) found |= static_cast<unsigned>(values[i]) << i;
  return found;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  const uint64_t* values = on_cpu::exchange("__reduce_add_sync", mask, on_cpu::bits<uint64_t>(value));
  int sum = 0;
  for (unsigned i = 0; i < 32; ++i) sum += static_cast<int>(static_cast<uint32_t>(values[i]));
  return sum;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned __float_as_uint(float x) { return on_cpu::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return on_cpu::bits<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(lrintf(x)); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};
}
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

// -- the runtime ---------------------------------------------------------------------------------------------------------------
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  on_cpu::run([&] { kernel(arguments...); }, how->gridDim, how->blockDim, how->dynamicSmemBytes);
  return cudaSuccess;
}
