// What both passes of the scan share. A warp has one channel of one row of the batch, and walks through time in tiles of 32 * kItems steps;
// lane l holds kItems neighbouring steps. A step maps a state x to a x + b, and such maps compose: (a, b) after (a', b') is (a a', a b' + b), so
// a warp's scan over its lanes gives every lane the state before its steps (Blelloch 1990). Steps are counted in the order of the scan: step s is
// position s, or length - 1 - s when reversed.
#pragma once

#include "common/cuda_math.cuh"
#include "common/cuda_types.cuh"
#include "scan/cuda_scan.h"

namespace cvmk::scan {

constexpr int kWarpLanes = 32;

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x / 32); }
__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// -- steps of a row ------------------------------------------------------------------------------------------------------------
// A row of steps of a tensor whose type is known at run time only. `whole`: vectors of 16 bytes of it can be read where a lane's steps begin.
struct Row {
  char* data;
  Dtype type;
  bool whole;
};
template <int kItems, bool kReverse>
__device__ inline Row row_at(const void* data, Dtype dtype, int64_t offset, int length) {
  const int size = static_cast<int>(size_of(dtype));
  char* const at = static_cast<char*>(const_cast<void*>(data)) + offset * size;
  return {at, dtype, (reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(kReverse ? length * size : 0)) % 16 == 0};
}

// The lane's steps [step, step + kItems); those behind the end are 0.
template <int kItems, bool kReverse, typename T>
__device__ __forceinline__ void load_steps(const T* row, bool whole, int length, int step, float (&out)[kItems]) {
  constexpr int kVector = cuda::kVector<T>;
  if (kItems % kVector == 0 && whole && step + kItems <= length) {
    const T* const from = row + (kReverse ? length - step - kItems : step);
#pragma unroll
    for (int v = 0; v < kItems / kVector; ++v) {
      float part[kVector];
      cuda::load_vector(from + v * kVector, part);
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[kReverse ? kItems - 1 - v * kVector - i : v * kVector + i] = part[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) out[i] = step + i < length ? cuda::widen(row[kReverse ? length - 1 - step - i : step + i]) : 0.0f;
}
template <int kItems, bool kReverse>
__device__ __forceinline__ void load_steps(const Row& row, int length, int step, float (&out)[kItems]) {
  if (row.type == kBFloat16) load_steps<kItems, kReverse>(reinterpret_cast<const __nv_bfloat16*>(row.data), row.whole, length, step, out);
  else if (row.type == kFloat16) load_steps<kItems, kReverse>(reinterpret_cast<const __half*>(row.data), row.whole, length, step, out);
  else load_steps<kItems, kReverse>(reinterpret_cast<const float*>(row.data), row.whole, length, step, out);
}

template <int kItems, bool kReverse, typename T>
__device__ __forceinline__ void store_steps(const float (&values)[kItems], T* row, bool whole, int length, int step) {
  constexpr int kVector = cuda::kVector<T>;
  if (kItems % kVector == 0 && whole && step + kItems <= length) {
    T* const to = row + (kReverse ? length - step - kItems : step);
#pragma unroll
    for (int v = 0; v < kItems / kVector; ++v) {
      float part[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) part[i] = values[kReverse ? kItems - 1 - v * kVector - i : v * kVector + i];
      cuda::store_vector(part, to + v * kVector);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (step + i < length) cuda::narrow(values[i], row[kReverse ? length - 1 - step - i : step + i]);
}
template <int kItems, bool kReverse>
__device__ __forceinline__ void store_steps(const float (&values)[kItems], const Row& row, int length, int step) {
  if (row.type == kBFloat16) store_steps<kItems, kReverse>(values, reinterpret_cast<__nv_bfloat16*>(row.data), row.whole, length, step);
  else if (row.type == kFloat16) store_steps<kItems, kReverse>(values, reinterpret_cast<__half*>(row.data), row.whole, length, step);
  else store_steps<kItems, kReverse>(values, reinterpret_cast<float*>(row.data), row.whole, length, step);
}

// The row of (batch, channel) of u, delta, z or the gradient of out, and of a contiguous result.
template <int kItems, bool kReverse>
__device__ inline Row row_of(const View& view, int64_t batch, int64_t channel, int length) {
  return row_at<kItems, kReverse>(view.data, view.dtype, batch * view.batch + channel * view.row, length);
}
template <int kItems, bool kReverse>
__device__ inline Row row_of(const Scan& s, void* result, Dtype dtype, int64_t batch, int64_t channel) {
  return row_at<kItems, kReverse>(result, dtype, (batch * s.channels + channel) * s.length, static_cast<int>(s.length));
}

// -- sequences -------------------------------------------------------------------------------------------------------------------
__device__ inline int64_t begin_of(const Scan& s, int64_t sequence) {
  return integer_at(s.cu_seqlens, s.cu_dtype, sequence);
}
// The sequence that position p is in: the last one that begins at p or before, so never an empty one.
__device__ inline int64_t sequence_at(const Scan& s, int64_t p) {
  int64_t low = 0, high = s.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (begin_of(s, middle) <= p) low = middle;
    else high = middle;
  }
  return low;
}

// Bits of a lane's steps that are the first or the last of their sequence in the order of the scan, and the sequences of those.
struct Marks {
  unsigned first = 0, last = 0;
  int* sequences;  // shared memory, of step i of this lane at i * 32
  __device__ int64_t sequence(int item) const { return sequences[item * kWarpLanes]; }
};

template <int kItems, bool kReverse>
__device__ inline void find_marks(const Scan& s, int64_t batch, int step, Marks& marks) {
  marks.first = marks.last = 0;
  int64_t sequence = batch;
  for (int i = 0; i < kItems && step + i < s.length; ++i) {
    const int64_t at = step + i, p = kReverse ? s.length - 1 - at : at;
    bool first = at == 0, last = at == s.length - 1;
    if (s.cu_seqlens != nullptr) {
      if (i == 0 || p < begin_of(s, sequence) || p >= begin_of(s, sequence + 1)) sequence = sequence_at(s, p);
      const bool at_begin = p == begin_of(s, sequence), at_end = p == begin_of(s, sequence + 1) - 1;
      first = kReverse ? at_end : at_begin;
      last = kReverse ? at_begin : at_end;
    }
    marks.first |= static_cast<unsigned>(first) << i;
    marks.last |= static_cast<unsigned>(last) << i;
    marks.sequences[i * kWarpLanes] = static_cast<int>(sequence);
  }
}

__device__ inline float initial_of(const Scan& s, int64_t sequence, int64_t channel, int n) {
  return s.initial == nullptr ? 0.0f : s.initial[(sequence * s.channels + channel) * s.states + n];
}

// -- maps of states ----------------------------------------------------------------------------------------------------------------
// x -> decay x + add. Where sequences meet, a decay of 0 lets nothing through, not even an infinity.
struct Map {
  float decay, add;
};
template <bool kMarks>
__device__ __forceinline__ float apply(const Map& map, float x) {
  return kMarks && map.decay == 0.0f ? map.add : map.decay * x + map.add;
}

// Of the maps of all lanes, the composition of those before this lane's (kLater: of those behind it, the last of them first).
template <bool kMarks, bool kLater>
__device__ __forceinline__ Map compose_others(Map map) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const float decay = kLater ? __shfl_down_sync(cuda::kAllLanes, map.decay, distance) : __shfl_up_sync(cuda::kAllLanes, map.decay, distance);
    const float add = kLater ? __shfl_down_sync(cuda::kAllLanes, map.add, distance) : __shfl_up_sync(cuda::kAllLanes, map.add, distance);
    if (kLater ? lane + distance < kWarpLanes : lane >= distance) {
      map.add = apply<kMarks>(map, add);
      map.decay *= decay;
    }
  }
  const float decay = kLater ? __shfl_down_sync(cuda::kAllLanes, map.decay, 1) : __shfl_up_sync(cuda::kAllLanes, map.decay, 1);
  const float add = kLater ? __shfl_down_sync(cuda::kAllLanes, map.add, 1) : __shfl_up_sync(cuda::kAllLanes, map.add, 1);
  return lane == (kLater ? kWarpLanes - 1 : 0) ? Map{1.0f, 0.0f} : Map{decay, add};
}

// One state of one channel over the lane's steps: decay exp(step A), and what is added, step u B. first[i] is the state before step i where that
// is an initial one.
template <int kItems, bool kMarks>
struct Steps {
  float decay[kItems], added[kItems];

  // The map of all of the lane's steps.
  __device__ __forceinline__ Map whole(const Scan& s, const Marks& marks, int64_t channel, int n) const {
    Map map{1.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (kMarks && (marks.first >> i & 1u)) {
        map = {0.0f, decay[i] * initial_of(s, marks.sequence(i), channel, n) + added[i]};
      } else {
        map.add = decay[i] * map.add + added[i];
        map.decay *= decay[i];
      }
    }
    return map;
  }
  // decay[i] times the state before step i, given that of step i - 1.
  __device__ __forceinline__ float kept(const Scan& s, const Marks& marks, int64_t channel, int n, int i, float before) const {
    return decay[i] * (kMarks && (marks.first >> i & 1u) ? initial_of(s, marks.sequence(i), channel, n) : before);
  }
};

// B or C: a row a state, varying, or one number a state and channel.
struct WeightRows {
  Row first;
  int64_t bytes;  // from a state's row to the next
  bool constant;
};
template <int kItems, bool kReverse>
__device__ inline WeightRows rows_of(const Scan& s, const Weights& w, int64_t batch, int64_t group, int64_t channel) {
  if (w.constant != nullptr) return {{reinterpret_cast<char*>(const_cast<float*>(w.constant + channel * s.states)), kFloat32, false}, 4, true};
  WeightRows rows{row_at<kItems, kReverse>(w.varying.data, w.varying.dtype, batch * w.varying.batch + group * w.group, static_cast<int>(s.length)),
                  w.varying.row * size_of(w.varying.dtype), false};
  rows.first.whole = rows.first.whole && rows.bytes % 16 == 0;
  return rows;
}
template <int kItems, bool kReverse>
__device__ __forceinline__ void load_weights(const WeightRows& rows, int n, int length, int step, float (&out)[kItems]) {
  char* const at = rows.first.data + n * rows.bytes;
  if (!rows.constant) return load_steps<kItems, kReverse>(Row{at, rows.first.type, rows.first.whole}, length, step, out);
  const float value = *reinterpret_cast<const float*>(at);
#pragma unroll
  for (int i = 0; i < kItems; ++i) out[i] = value;
}

// Step sizes, 0 behind the end: then the decay is 1 and nothing is added.
template <int kItems>
__device__ __forceinline__ void to_step_sizes(const Scan& s, float bias, int step, float (&delta)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float raw = delta[i] + bias;
    delta[i] = step + i < s.length ? (s.softplus ? cuda::softplus(raw) : raw) : 0.0f;
  }
}

__device__ inline float channel_value(const float* data, int64_t channel) { return data == nullptr ? 0.0f : data[channel]; }

// Steps of a lane: 2 for sequences of one chunk, 8 for longer ones.
inline int items_for(int64_t length) { return length <= kChunk ? 2 : 8; }

// to[i] = from[i], or 0 without `from`, for the states [channels, states] of sequences that are empty.
cudaError_t pass_empty(const Scan& s, const float* from, float* to, cudaStream_t stream);

}  // namespace cvmk::scan
