// Backward pass of the selective scan: a warp a channel, up to 12 channels of one group to a block, tiles from the last to the first. A tile's
// states are computed again from the one that the forward pass kept; then the gradient h of the states comes back through
//     g_t = a_t h_t,   h_t = C_t dy_t + g_{t+1}
// which is a scan of the same kind. dB and dC are sums over the channels of a group: a block adds those of its warps in shared memory, in their
// order, and writes a part; parts, like those of dA, dD and the others that are sums over the batch, are added by a last kernel in their order.
#include "scan/cuda_scan.cuh"

namespace cvmk::scan {
namespace {

using namespace cvmk::cuda;

constexpr int kMostWarps = 12;  // 168 registers a thread: nothing is spilled

inline int warps_for(const Scan& s) { return s.channels / s.groups > 4 ? kMostWarps : 4; }

// Where the parts of a gradient are in the workspace; null where the gradient is not asked for.
struct Parts {
  float *dA = nullptr, *dD = nullptr, *dbias = nullptr;  // [batch, channels, states] and [batch, channels]
  float *dB = nullptr, *dC = nullptr;  // [batch, groups, blocks, states, tiles, items, lanes]; constant weights: [batch, channels, states]
  int64_t floats = 0;
};

Parts parts_of(const ScanBackward& p, float* workspace) {
  const Scan& s = p.scan;
  const int64_t steps = kWarpLanes * items_for(s.length), padded = divide_up(s.length, steps) * steps;
  const int64_t varying = s.batch * s.groups * divide_up(s.channels / s.groups, warps_for(s)) * s.states * padded, channels = s.batch * s.channels;
  Parts parts;
  const auto take = [&](bool wanted, int64_t size) {
    float* const at = workspace + parts.floats;
    if (wanted) parts.floats += size;
    return wanted ? at : nullptr;
  };
  parts.dA = take(p.dA != nullptr, channels * s.states);
  parts.dD = take(p.dD != nullptr, channels);
  parts.dbias = take(p.dbias != nullptr, channels);
  parts.dB = take(p.dB != nullptr, s.B.constant == nullptr ? varying : channels * s.states);
  parts.dC = take(p.dC != nullptr, s.C.constant == nullptr ? varying : channels * s.states);
  return parts;
}

struct Launch {
  ScanBackward pass;
  Parts parts;
};

// A block's shared memory. Of a warp and state: `carry`, g behind the tile; sums over time for dA and for constant B and C.
struct Shared {
  float *carry, *dA, *dB, *dC;  // [warps][states]
  float* exchange;              // [2][warps][items][lanes]
  int* sequences;               // [warps][items][lanes]
};
__host__ __device__ inline size_t shared_floats(int64_t states, int warps, int items) {
  return static_cast<size_t>(warps) * (4 * static_cast<size_t>(states) + 3 * static_cast<size_t>(items) * kWarpLanes);
}
__device__ inline Shared shared_of(int64_t states, int items) {
  const int64_t warps = blockDim.x / 32, table = warps * states, steps = warps * items * kWarpLanes;
  float* const memory = shared_memory<float>();
  return {memory, memory + table, memory + 2 * table, memory + 3 * table, memory + 4 * table, reinterpret_cast<int*>(memory + 4 * table + 2 * steps)};
}

// What a warp has of its channel in a tile. sum_hB: sum over the states of h B; sum_wA: of w A, with w = h a x_before.
template <int kItems>
struct Tile {
  float rate[kItems], drive[kItems], dy[kItems], y[kItems], sum_hB[kItems], sum_wA[kItems];
};

struct Where {
  int batch, group, channel;
  int step;           // the lane's first
  const float* kept;  // the states before the tile
  bool active;        // false in warps that have no channel: they go along with zeros, for the barriers
};

// One state of one channel over one tile. dB and dC of the lane's steps go to to_B[item * 32] and to_C[item * 32]; sums has those over the
// lane's steps of dA (times log2(e)), dB and dC.
template <int kItems, bool kReverse, bool kMarks>
__device__ __forceinline__ void state_gradient(const ScanBackward& p, const Marks& marks, const Where& at, const WeightRows& B_rows, const WeightRows& C_rows, int n,
                                               Tile<kItems>& tile, float& carry, float* to_B, float* to_C, float (&sums)[3]) {
  const Scan& s = p.scan;
  const int length = static_cast<int>(s.length);
  const int64_t index = at.channel * s.states + n;
  const float A = s.A[index];
  float B[kItems], c[kItems], kept[kItems];  // c: C dy, and the gradient of the last state where a sequence ends
  Steps<kItems, kMarks> steps;
  load_weights<kItems, kReverse>(B_rows, n, length, at.step, B);
  load_weights<kItems, kReverse>(C_rows, n, length, at.step, c);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    steps.decay[i] = exp2_fast(tile.rate[i] * A);
    steps.added[i] = tile.drive[i] * B[i];
  }
  float x = apply<kMarks>(compose_others<kMarks, false>(steps.whole(s, marks, at.channel, n)), at.kept[n]);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    kept[i] = steps.kept(s, marks, at.channel, n, i, x);
    x = kept[i] + steps.added[i];
    tile.y[i] += c[i] * x;
    c[i] *= tile.dy[i];
    if (kMarks && (marks.last >> i & 1u) && p.grad_last != nullptr) c[i] += p.grad_last[marks.sequence(i) * s.channels * s.states + index];
  }

  Map back{1.0f, 0.0f};  // of g behind the lane's steps to g at the first of them
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const bool cut = kMarks && (marks.first >> i & 1u);
    back = cut ? Map{0.0f, 0.0f} : Map{steps.decay[i] * back.decay, steps.decay[i] * (c[i] + back.add)};
  }
  float g = apply<kMarks>(compose_others<kMarks, true>(back), carry);
  sums[0] = sums[1] = sums[2] = 0.0f;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const float h = c[i] + g, w = h * kept[i], dB = h * tile.drive[i], dC = tile.dy[i] * (kept[i] + tile.drive[i] * B[i]);
    to_B[i * kWarpLanes] = dB;
    to_C[i * kWarpLanes] = dC;
    tile.sum_hB[i] += h * B[i];
    tile.sum_wA[i] += w * A;
    sums[0] += tile.rate[i] * w;
    sums[1] += dB;
    sums[2] += dC;
    g = steps.decay[i] * h;
    if (kMarks && (marks.first >> i & 1u)) {
      if (p.dinitial != nullptr && at.active) p.dinitial[marks.sequence(i) * s.channels * s.states + index] = g;
      g = 0.0f;
    }
  }
  carry = __shfl_sync(kAllLanes, g, 0);
}

// The sums over the block's channels of what its warps left in `exchange`, to the parts.
template <int kItems>
__device__ void add_over_channels(const Launch& l, const Shared& shared, const Where& at, int block, int blocks, int tile, int n) {
  constexpr int kSteps = kItems * kWarpLanes;
  const Scan& s = l.pass.scan;
  const int warps = static_cast<int>(blockDim.x / 32);
  __syncthreads();
  const int64_t tiles = divide_up(s.length, kSteps);
  const int64_t part = ((((at.batch * s.groups + at.group) * blocks + block) * s.states + n) * tiles + tile) * kSteps;
  for (int j = static_cast<int>(threadIdx.x); j < 2 * kSteps; j += static_cast<int>(blockDim.x)) {
    const bool of_C = j >= kSteps;
    float* const to = of_C ? (s.C.constant == nullptr ? l.parts.dC : nullptr) : (s.B.constant == nullptr ? l.parts.dB : nullptr);
    if (to == nullptr) continue;
    const float* const from = shared.exchange + (of_C ? (warps - 1) * kSteps : 0) + j;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += from[w * kSteps];
    to[part + (of_C ? j - kSteps : j)] = sum;
  }
  __syncthreads();
}

template <int kItems, bool kReverse>
__device__ __forceinline__ void load_tile(const ScanBackward& p, const Where& at, float bias, Tile<kItems>& tile) {
  const Scan& s = p.scan;
  const int length = static_cast<int>(s.length), there = at.active ? length : 0;
  float z[kItems];
  load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.u, at.batch, at.channel, length), length, at.step, tile.drive);
  load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.delta, at.batch, at.channel, length), length, at.step, tile.rate);
  to_step_sizes(s, bias, at.step, tile.rate);
  if (p.grad_out.data != nullptr) load_steps<kItems, kReverse>(row_of<kItems, kReverse>(p.grad_out, at.batch, at.channel, length), length, at.step, tile.dy);
  if (s.z.data != nullptr) load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.z, at.batch, at.channel, length), length, at.step, z);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool real = at.step + i < there;
    tile.drive[i] = real ? tile.drive[i] * tile.rate[i] : 0.0f;
    tile.rate[i] = real ? tile.rate[i] * kLog2e : 0.0f;
    tile.dy[i] = real && p.grad_out.data != nullptr ? tile.dy[i] : 0.0f;
    if (s.z.data != nullptr) tile.dy[i] *= z[i] * sigmoid(z[i]);
    tile.y[i] = tile.sum_hB[i] = tile.sum_wA[i] = 0.0f;
  }
}

// du, ddelta and dz of a tile; adds to the sums over time that dD and d delta_bias are.
template <int kItems, bool kReverse>
__device__ __forceinline__ void store_tile(const ScanBackward& p, const Where& at, float bias, float D, const Tile<kItems>& tile, float& dD, float& dbias) {
  const Scan& s = p.scan;
  const int length = static_cast<int>(s.length);
  float u[kItems], raw[kItems], out[kItems];
  load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.u, at.batch, at.channel, length), length, at.step, u);
  load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.delta, at.batch, at.channel, length), length, at.step, raw);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    raw[i] += bias;
    out[i] = D * tile.dy[i] + (s.softplus ? softplus(raw[i]) : raw[i]) * tile.sum_hB[i];
    dD += tile.dy[i] * u[i];
  }
  if (p.du != nullptr) store_steps<kItems, kReverse>(out, row_of<kItems, kReverse>(s, p.du, s.u.dtype, at.batch, at.channel), length, at.step);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    out[i] = u[i] * tile.sum_hB[i] + tile.sum_wA[i];
    if (s.softplus && raw[i] <= 20.0f) out[i] *= sigmoid(raw[i]);
    if (at.step + i < length) dbias += out[i];
  }
  if (p.ddelta != nullptr) store_steps<kItems, kReverse>(out, row_of<kItems, kReverse>(s, p.ddelta, s.delta.dtype, at.batch, at.channel), length, at.step);
  if (p.dz == nullptr) return;
  float z[kItems], g[kItems] = {};
  load_steps<kItems, kReverse>(row_of<kItems, kReverse>(s.z, at.batch, at.channel, length), length, at.step, z);
  if (p.grad_out.data != nullptr) load_steps<kItems, kReverse>(row_of<kItems, kReverse>(p.grad_out, at.batch, at.channel, length), length, at.step, g);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float gate = sigmoid(z[i]);
    out[i] = g[i] * (tile.y[i] + D * u[i]) * gate * (1.0f + z[i] * (1.0f - gate));
  }
  store_steps<kItems, kReverse>(out, row_of<kItems, kReverse>(s, p.dz, s.z.dtype, at.batch, at.channel), length, at.step);
}

template <int kItems, bool kReverse>
__global__ void __launch_bounds__(kMostWarps * 32, 1) backward_channels(const Launch l) {
  const ScanBackward& p = l.pass;
  const Scan& s = p.scan;
  const int groups = static_cast<int>(s.groups), width = static_cast<int>(s.channels) / groups, warps = static_cast<int>(blockDim.x / 32);
  const int blocks = (width + warps - 1) / warps, block = static_cast<int>(blockIdx.x) % blocks, row = static_cast<int>(blockIdx.x) / blocks;
  const int in_group = block * warps + warp_of_block();
  Where at;
  at.batch = row / groups;
  at.group = row % groups;
  at.active = in_group < width;
  at.channel = at.group * width + (at.active ? in_group : 0);
  const int lane = lane_of_warp();
  Shared shared = shared_of(s.states, kItems);
  float* const tables[4] = {shared.carry, shared.dA, shared.dB, shared.dC};
  for (float* table : tables)
    for (int64_t n = lane; n < s.states; n += kWarpLanes) table[warp_of_block() * s.states + n] = 0.0f;
  __syncwarp();
  Marks marks;
  marks.sequences = shared.sequences + warp_of_block() * kItems * kWarpLanes + lane;
  const float bias = channel_value(s.bias, at.channel), D = channel_value(s.D, at.channel);
  const bool exchanged = (l.parts.dB != nullptr && s.B.constant == nullptr) || (l.parts.dC != nullptr && s.C.constant == nullptr);
  float* const to_B = shared.exchange + warp_of_block() * kItems * kWarpLanes + lane;
  float* const to_C = to_B + warps * kItems * kWarpLanes;
  const WeightRows B = rows_of<kItems, kReverse>(s, s.B, at.batch, at.group, at.channel), C = rows_of<kItems, kReverse>(s, s.C, at.batch, at.group, at.channel);
  const int states = static_cast<int>(s.states);
  float dD = 0.0f, dbias = 0.0f;

  for (int index = static_cast<int>(divide_up(s.length, kItems * kWarpLanes)) - 1; index >= 0; --index) {
    const int start = index * kItems * kWarpLanes;
    at.step = start + lane * kItems;
    at.kept = p.kept + ((at.batch * divide_up(s.length, kChunk) + start / kChunk) * s.channels + at.channel) * s.states;
    Tile<kItems> tile;
    load_tile<kItems, kReverse>(p, at, bias, tile);
    find_marks<kItems, kReverse>(s, at.batch, at.step, marks);
    const bool marked = __any_sync(kAllLanes, marks.first | marks.last);
    for (int n = 0; n < states; ++n) {
      const int cell = warp_of_block() * states + n;
      float carry = shared.carry[cell], sums[3];
      if (marked) state_gradient<kItems, kReverse, true>(p, marks, at, B, C, n, tile, carry, to_B, to_C, sums);
      else state_gradient<kItems, kReverse, false>(p, marks, at, B, C, n, tile, carry, to_B, to_C, sums);
      sums[0] = warp_reduce<Sum>(sums[0]);
      if (B.constant) sums[1] = warp_reduce<Sum>(sums[1]);
      if (C.constant) sums[2] = warp_reduce<Sum>(sums[2]);
      if (lane == 0) {
        shared.carry[cell] = carry;
        shared.dA[cell] += sums[0];
        shared.dB[cell] += sums[1];
        shared.dC[cell] += sums[2];
      }
      if (exchanged) add_over_channels<kItems>(l, shared, at, block, blocks, index, n);
    }
    __syncwarp();
    if (at.active) store_tile<kItems, kReverse>(p, at, bias, D, tile, dD, dbias);
  }

  if (!at.active) return;
  const int64_t channel = at.batch * s.channels + at.channel;
  dD = warp_reduce<Sum>(dD);
  dbias = warp_reduce<Sum>(dbias);
  if (lane == 0 && l.parts.dD != nullptr) l.parts.dD[channel] = dD;
  if (lane == 0 && l.parts.dbias != nullptr) l.parts.dbias[channel] = dbias;
  for (int64_t n = lane; n < s.states; n += kWarpLanes) {
    const int64_t cell = warp_of_block() * s.states + n, to = channel * s.states + n;
    if (l.parts.dA != nullptr) l.parts.dA[to] = shared.dA[cell] * kLn2;
    if (l.parts.dB != nullptr && s.B.constant != nullptr) l.parts.dB[to] = shared.dB[cell];
    if (l.parts.dC != nullptr && s.C.constant != nullptr) l.parts.dC[to] = shared.dC[cell];
  }
}

// to[o, j] = sum over the parts of from[o, part, j], in their order. With `length` j runs over [states, tiles, items, lanes] and `to` is [o, states,
// length] in positions.
struct PartSum {
  const float* from;
  void* to;
  int64_t outer, parts, inner;
  int type;
  int64_t length, items, reverse;
};

__global__ void __launch_bounds__(256) sum_parts(const PartSum p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, o = at / p.inner, j = at % p.inner;
  if (o >= p.outer) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < p.parts; ++part) sum += p.from[(o * p.parts + part) * p.inner + j];
  if (p.length == 0) return store_as(sum, p.to, p.type, at);
  const int64_t steps = p.items * kWarpLanes, padded = divide_up(p.length, steps) * steps, n = j / padded, r = j % padded;
  const int64_t step = r / steps * steps + r % kWarpLanes * p.items + r % steps / kWarpLanes;
  if (step < p.length) store_as(sum, p.to, p.type, (o * (p.inner / padded) + n) * p.length + (p.reverse ? p.length - 1 - step : step));
}

cudaError_t add_parts(const PartSum& p, cudaStream_t stream) {
  if (p.to == nullptr || p.outer * p.inner == 0) return cudaSuccess;
  return launch(sum_parts, dim3(static_cast<unsigned>(divide_up(p.outer * p.inner, 256))), 256, 0, stream, p);
}

PartSum weight_sum(const Scan& s, const Weights& w, const float* from, void* to) {
  if (w.constant != nullptr) return {from, to, 1, s.batch, s.channels * s.states, kFloat32, 0, 0, 0};
  const int64_t items = items_for(s.length), steps = kWarpLanes * items, padded = divide_up(s.length, steps) * steps;
  const int64_t blocks = divide_up(s.channels / s.groups, warps_for(s));
  return {from, to, s.batch * s.groups, blocks, s.states * padded, w.varying.dtype, s.length, items, s.reverse};
}

template <int kItems>
cudaError_t run(const Launch& l, cudaStream_t stream) {
  const Scan& s = l.pass.scan;
  const int warps = warps_for(s);
  const int64_t blocks = s.batch * s.groups * divide_up(s.channels / s.groups, warps);
  if (blocks == 0) return cudaSuccess;
  const auto kernel = s.reverse ? backward_channels<kItems, true> : backward_channels<kItems, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(warps * 32), shared_floats(s.states, warps, kItems) * sizeof(float), stream, l);
}

}  // namespace

int64_t cuda_workspace(const ScanBackward& p) { return parts_of(p, nullptr).floats; }

cudaError_t cuda_backward(const CudaBackward& call, cudaStream_t stream) {
  const ScanBackward& p = call.pass;
  const Scan& s = p.scan;
  const Launch l{p, parts_of(p, call.workspace)};
  cudaError_t status = pass_empty(s, p.grad_last, p.dinitial, stream);
  if (status == cudaSuccess) status = items_for(s.length) == 2 ? run<2>(l, stream) : run<8>(l, stream);
  const PartSum sums[] = {
      {l.parts.dA, p.dA, 1, s.batch, s.channels * s.states, kFloat32, 0, 0, 0},
      {l.parts.dD, p.dD, 1, s.batch, s.channels, kFloat32, 0, 0, 0},
      {l.parts.dbias, p.dbias, 1, s.batch, s.channels, kFloat32, 0, 0, 0},
      weight_sum(s, s.B, l.parts.dB, p.dB),
      weight_sum(s, s.C, l.parts.dC, p.dC),
  };
  for (const PartSum& sum : sums)
    if (status == cudaSuccess) status = add_parts(sum, stream);
  return status;
}

}  // namespace cvmk::scan
