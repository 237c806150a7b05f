// Forward pass of the selective scan: a warp a channel, four to a block, no barrier. Limit: one exponential a state and step (16 a clock and
// multiprocessor: 4.5 ps a step and channel with 16 states on 132 multiprocessors at 1.7 GHz); the warp's scan adds 25 / kItems instructions a
// step to the 7 that a state needs. u, delta, z and out are read and written 16 bytes a lane; B and C are shared by the channels of a group and
// come from the first-level cache.
#include "scan/cuda_scan.cuh"

namespace cvmk::scan {
namespace {

using namespace cvmk::cuda;

constexpr int kWarps = 4;

struct Where {
  int64_t batch, channel;
  int step;     // the lane's first
  float* kept;  // where the states before that step go; null where nowhere
};

// One state over one tile: adds C x to y, moves `carry`, the state before the tile, to the state behind it.
template <int kItems, bool kReverse, bool kMarks>
__device__ __forceinline__ void advance(const ScanForward& p, const Marks& marks, const Where& at, const WeightRows& B, const WeightRows& C, int n,
                                        const float (&rate)[kItems], const float (&drive)[kItems], float& carry, float (&y)[kItems]) {
  const Scan& s = p.scan;
  const int length = static_cast<int>(s.length);
  const float A = s.A[at.channel * s.states + n];
  Steps<kItems, kMarks> steps;
  float weights[kItems];
  load_weights<kItems, kReverse>(B, n, length, at.step, weights);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    steps.decay[i] = exp2_fast(rate[i] * A);
    steps.added[i] = drive[i] * weights[i];
  }
  load_weights<kItems, kReverse>(C, n, length, at.step, weights);
  float x = apply<kMarks>(compose_others<kMarks, false>(steps.whole(s, marks, at.channel, n)), carry);
  if (at.kept != nullptr) at.kept[n] = x;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    x = steps.kept(s, marks, at.channel, n, i, x) + steps.added[i];
    y[i] += weights[i] * x;
    if (kMarks && (marks.last >> i & 1u)) p.last[(marks.sequence(i) * s.channels + at.channel) * s.states + n] = x;
  }
  carry = __shfl_sync(kAllLanes, x, kWarpLanes - 1);
}

template <int kItems, bool kReverse>
__global__ void __launch_bounds__(kWarps * 32, 4) forward_channels(const ScanForward p) {
  const Scan& s = p.scan;
  const int64_t blocks = divide_up(s.channels, kWarps);
  Where at;
  at.batch = blockIdx.x / blocks;
  at.channel = blockIdx.x % blocks * kWarps + warp_of_block();
  if (at.channel >= s.channels) return;
  const int lane = lane_of_warp(), states = static_cast<int>(s.states), length = static_cast<int>(s.length);
  const int64_t group = at.channel / (s.channels / s.groups), chunks = divide_up(s.length, kChunk);
  const WeightRows B = rows_of<kItems, kReverse>(s, s.B, at.batch, group, at.channel), C = rows_of<kItems, kReverse>(s, s.C, at.batch, group, at.channel);
  float* const carries = shared_memory<float>() + warp_of_block() * states;
  Marks marks;
  marks.sequences = shared_memory<int>() + kWarps * states + warp_of_block() * kWarpLanes * kItems + lane;
  for (int n = lane; n < states; n += kWarpLanes) carries[n] = 0.0f;
  __syncwarp();
  const float bias = channel_value(s.bias, at.channel), D = channel_value(s.D, at.channel);

  for (int start = 0; start < length; start += kWarpLanes * kItems) {
    at.step = start + lane * kItems;
    at.kept = nullptr;
    if (p.kept != nullptr && at.step % kChunk == 0 && at.step < length)
      at.kept = p.kept + ((at.batch * chunks + at.step / kChunk) * s.channels + at.channel) * s.states;
    float rate[kItems], drive[kItems], y[kItems];
    load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.u, at.batch, at.channel, length), length, at.step, drive);
    load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.delta, at.batch, at.channel, length), length, at.step, rate);
    to_step_sizes(s, bias, at.step, rate);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      y[i] = D * drive[i];
      drive[i] *= rate[i];
      rate[i] *= kLog2e;
    }
    find_marks<kItems, kReverse>(s, at.batch, at.step, marks);
    const bool marked = __any_sync(kAllLanes, marks.first | marks.last);
    for (int n = 0; n < states; ++n) {
      float carry = carries[n];
      if (marked) advance<kItems, kReverse, true>(p, marks, at, B, C, n, rate, drive, carry, y);
      else advance<kItems, kReverse, false>(p, marks, at, B, C, n, rate, drive, carry, y);
      if (lane == 0) carries[n] = carry;
    }
    __syncwarp();
    if (s.z.data != nullptr) {
      float z[kItems];
      load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.z, at.batch, at.channel, length), length, at.step, z);
#pragma unroll
      for (int i = 0; i < kItems; ++i) y[i] *= z[i] * sigmoid(z[i]);
    }
    store_steps<kItems, kReverse>(y, row_of<kItems, kReverse>(s, p.out, s.u.dtype, at.batch, at.channel), length, at.step);
  }
}

__global__ void __launch_bounds__(256) copy_empty(const Scan s, const float* from, float* to) {
  const int64_t size = s.channels * s.states, sequences = s.cu_seqlens == nullptr ? s.batch : s.sequences;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, sequence = at / size;
  if (sequence >= sequences) return;
  const bool empty = s.cu_seqlens == nullptr ? s.length == 0 : begin_of(s, sequence) == begin_of(s, sequence + 1);
  if (empty) to[at] = from == nullptr ? 0.0f : from[at];
}

template <int kItems>
cudaError_t run(const ScanForward& p, cudaStream_t stream) {
  const Scan& s = p.scan;
  const auto kernel = s.reverse ? forward_channels<kItems, true> : forward_channels<kItems, false>;
  const size_t shared = static_cast<size_t>(kWarps) * (static_cast<size_t>(s.states) + kWarpLanes * kItems) * sizeof(float);
  return launch(kernel, dim3(static_cast<unsigned>(s.batch * divide_up(s.channels, kWarps))), kWarps * 32, shared, stream, p);
}

}  // namespace

cudaError_t pass_empty(const Scan& s, const float* from, float* to, cudaStream_t stream) {
  const int64_t size = (s.cu_seqlens == nullptr ? s.batch : s.sequences) * s.channels * s.states;
  if (to == nullptr || size == 0 || (s.cu_seqlens == nullptr && s.length > 0)) return cudaSuccess;
  return launch(copy_empty, dim3(static_cast<unsigned>(divide_up(size, 256))), 256, 0, stream, s, from, to);
}

cudaError_t cuda_forward(const ScanForward& p, cudaStream_t stream) {
  const cudaError_t status = pass_empty(p.scan, p.scan.initial, p.last, stream);
  if (status != cudaSuccess || p.scan.batch * p.scan.channels * p.scan.length == 0) return status;
  return items_for(p.scan.length) == 2 ? run<2>(p, stream) : run<8>(p, stream);
}

}  // namespace cvmk::scan
