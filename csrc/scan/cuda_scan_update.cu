// One step of the selective scan: state = exp(step A) state + step x B, y = sum_n C state. The state's bytes limit it: they are read and written
// once. Eight lanes have a row (a channel of a head) and take its states in turn, so that a row of float32 is read 32 bytes at a time.
#include "scan/cuda_scan.cuh"

namespace cvmk::scan {
namespace {

using namespace cvmk::cuda;

constexpr int kLanesOfRow = 8, kThreads = 128;

__device__ inline float value_of(const Update::Input& from, int64_t batch, int64_t head, int64_t row) {
  return from.data == nullptr ? 0.0f : load_as(from.data, from.dtype, batch * from.batch + head * from.head + row * from.row);
}

__global__ void __launch_bounds__(kThreads) update_rows(const Update p) {
  const int64_t rows = p.batch * p.heads * p.dim;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanesOfRow;
  const int64_t at = index < rows ? index : rows - 1;  // rows behind the last go along, for the exchange below
  const int64_t batch = at / (p.heads * p.dim), head = at / p.dim % p.heads, row = at % p.dim, group = head / (p.heads / p.groups);
  const float x = value_of(p.x, batch, head, row), raw = value_of(p.dt, batch, head, row) + value_of(p.bias, batch, head, row);
  const float step = p.softplus ? softplus(raw) : raw, rate = step * kLog2e, drive = step * x;
  const int64_t state = batch * p.state_batch + head * p.state_head + row * p.state_row, A = head * p.A_head + row * p.A_row;
  const int64_t B = batch * p.B.batch + group * p.B.row, C = batch * p.C.batch + group * p.C.row;
  const Dtype type = p.state_dtype, B_type = p.B.dtype, C_type = p.C.dtype;
  float y = 0.0f;
  for (int64_t n = threadIdx.x % kLanesOfRow; n < p.states; n += kLanesOfRow) {
    const int64_t cell = state + n * p.state_column;
    const float decay = exp2_fast(rate * static_cast<const float*>(p.A)[A + n * p.A_column]);
    const float next = decay * load_as(p.state, type, cell) + drive * load_as(p.B.data, B_type, B + n * p.B.column);
    y += next * load_as(p.C.data, C_type, C + n * p.C.column);
    if (index < rows) store_as(next, p.state, type, cell);
  }
#pragma unroll
  for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) y += __shfl_xor_sync(kAllLanes, y, distance);
  if (index >= rows || threadIdx.x % kLanesOfRow != 0) return;
  y += value_of(p.D, batch, head, row) * x;
  if (p.z.data != nullptr) {
    const float z = value_of(p.z, batch, head, row);
    y *= z * sigmoid(z);
  }
  store_as(y, p.out, p.x.dtype, at);
}

}  // namespace

cudaError_t cuda_update(const Update& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.dim;
  if (rows == 0) return cudaSuccess;
  return launch(update_rows, dim3(static_cast<unsigned>(divide_up(rows * kLanesOfRow, kThreads))), kThreads, 0, stream, p);
}

}  // namespace cvmk::scan
