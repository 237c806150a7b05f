// What on_cpu.h does and what it finds: kernels that are right, and kernels that are wrong in the ways that a device leaves unsaid.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_types.cuh"

namespace {

using namespace cvmk::cuda;

int failures = 0;

void check(bool good, const char* text, int line) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "line %d: failed: %s\n", line, text);
}
#define CHECK(condition) check(static_cast<bool>(condition), #condition, __LINE__)

// `out` of a launch in each order of the threads.
template <typename... Parameters>
std::vector<std::vector<float>> in_every_order(void (*kernel)(float*, Parameters...), unsigned blocks, unsigned threads, size_t shared, Parameters... more) {
  std::vector<std::vector<float>> found;
  for (const auto order : {on_cpu::Order::kAscending, on_cpu::Order::kDescending, on_cpu::Order::kShuffled}) {
    on_cpu::set_order(order);
    std::vector<float> out(blocks * threads);
    launch(kernel, dim3(blocks), threads, shared, nullptr, out.data(), more...);
    found.push_back(out);
  }
  on_cpu::set_order(on_cpu::Order::kAscending);
  return found;
}

template <typename... Parameters>
std::string error_of(void (*kernel)(Parameters...), unsigned threads, Parameters... arguments) {
  try {
    launch(kernel, dim3(1), threads, 256, nullptr, arguments...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

__global__ void sums(float* out) {
  float values[2] = {static_cast<float>(threadIdx.x), 1.0f};
  block_reduce<Sum>(values, shared_memory<float>());
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[0] + 1000.0f * values[1];
}

__global__ void exchanges(float* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float up = __shfl_up_sync(kAllLanes, static_cast<float>(lane), 3), down = __shfl_down_sync(kAllLanes, static_cast<float>(lane), 30);
  const int third = __shfl_sync(kAllLanes, 10 * lane, 3), added = __reduce_add_sync(kAllLanes, lane - 20);
  const unsigned odd = __ballot_sync(kAllLanes, lane & 1);
  const bool good = up == static_cast<float>(lane < 3 ? lane : lane - 3) && down == static_cast<float>(lane < 2 ? lane + 30 : lane) && third == 30 &&
                    added == 496 - 640 && odd == 0xAAAAAAAAu && __shfl_xor_sync(kAllLanes, lane, 5) == (lane ^ 5) && __any_sync(kAllLanes, lane == 7);
  out[threadIdx.x] = good ? 1.0f : 0.0f;
}

// Each thread reads its neighbour's number: with the barrier in any order, without it what the order makes of it.
__global__ void neighbours(float* out, bool synchronised) {
  float* const shared = shared_memory<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (synchronised) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void unwritten(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

__global__ void some_at_the_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void some_in_the_exchange() {
  if (threadIdx.x % 32 < 9) __syncwarp();
}
__global__ void different_exchanges() {
  if (threadIdx.x % 2) __syncwarp();
  else __shfl_sync(kAllLanes, 1, 0);
}
__global__ void masked_exchange() { __syncwarp(0xFFu); }
__global__ void nothing() {}

bool same(const std::vector<float>& a, const std::vector<float>& b) { return memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }

}  // namespace

int main() {
  for (const auto& out : in_every_order(&sums, 3, 96, 2 * 32 * sizeof(float)))
    for (float value : out) CHECK(value == 96 * 95 / 2 + 96000.0f);
  for (const auto& out : in_every_order(&exchanges, 1, 64, 0))
    for (float value : out) CHECK(value == 1.0f);

  const auto good = in_every_order(&neighbours, 1, 64, 256, true), racy = in_every_order(&neighbours, 1, 64, 256, false);
  CHECK(same(good[0], good[1]) && same(good[0], good[2]) && good[0][63] == 0.0f);
  CHECK(!same(racy[0], racy[1]) && !same(racy[0], racy[2]));
  const auto poison = in_every_order(&unwritten, 1, 32, 128);
  for (float value : poison[0]) CHECK(value != value);

  CHECK(error_of(&some_at_the_barrier, 64).find("left out") != std::string::npos);
  CHECK(error_of(&some_in_the_exchange, 64).find("left out") != std::string::npos);
  CHECK(error_of(&different_exchanges, 64).find("other lanes of the warp are at") != std::string::npos);
  CHECK(error_of(&masked_exchange, 32).find("mask") != std::string::npos);
  CHECK(error_of(&nothing, 48).find("whole warps") != std::string::npos);
  CHECK(error_of(&nothing, 64).empty());  // after errors the next launch is as good as the first

  for (float x : {0.0f, 1.0f, -2.5f, 1.00390625f, 1.01171875f, 3e38f, 1e-40f}) {
    __nv_bfloat16 b;
    __half h;
    narrow(x, b);
    narrow(x, h);
    CHECK(fabsf(widen(b) - x) <= fabsf(x) / 256 + 1e-40f || isinf(widen(b)));
    CHECK(fabsf(x) > 65504 ? isinf(widen(h)) : fabsf(widen(h) - x) <= fabsf(x) / 2048 + 1e-7f);
  }
  CHECK(__float2bfloat16_rn(1.00390625f).bits == 0x3F80 && __float2bfloat16_rn(1.01171875f).bits == 0x3F82);  // ties go to even
  CHECK(__dp4a(0x7F80FF01, 0x7F7F7F02, 5) == 5 + 127 * 127 - 128 * 127 - 127 + 2);
  return failures == 0 ? 0 : 1;
}
