// Arguments of the selective scan and of its single step: plain pointers and sizes, strides in elements.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk {
namespace scan {

// Time steps between two states that the forward pass keeps; cvmk/ops/selective_scan.py calls it SCAN_CHUNK.
constexpr int64_t kChunk = 64;

// [batch, row, column] in any strides; data is null where the tensor is absent. Rows are channels and columns time.
struct View {
  void* data;
  Dtype dtype;
  int64_t batch, row, column;
};

// B or C: [batch, group, state, time], or the same at every step: [channel, state], float32 and contiguous.
struct Weights {
  View varying;  // one batch stride; the group has a stride of its own, rows are states
  int64_t group;
  const float* constant;  // null where the weights vary
};

struct Scan {
  int64_t batch, channels, length, states, groups;
  int64_t softplus, reverse;
  int64_t channels_last;  // whether out, du, ddelta and dz are [batch, length, channels], and dB and dC [batch, length, group, state]
  View u, delta, z;
  Weights B, C;
  const float *A, *D, *bias, *initial;  // contiguous; all but A may be null
  const void* cu_seqlens;               // null where nothing is packed; else sequences + 1 elements
  Dtype cu_dtype;                       // kInt32 or kInt64
  int64_t sequences;
};

struct ScanForward {
  Scan scan;
  void* out;         // [batch, channels, length] (or channels last), in u's dtype
  float* last;       // [sequences or batch, channels, states]
  float* kept;       // [batch, chunks * channels, states]: states before each chunk in the order of the scan; may be null
};

// Outputs are contiguous; a null one is not asked for. Each is in the dtype of the tensor that it is the gradient of, float32 for the rest.
struct ScanBackward {
  Scan scan;
  View grad_out;           // null data: zero
  const float* grad_last;  // null: zero
  const float* kept;
  void *du, *ddelta, *dz, *dB, *dC;
  float *dA, *dD, *dbias, *dinitial;
};

// One step. Rows are the channels of all heads; state [batch, heads, dim, states].
struct Update {
  int64_t batch, heads, dim, states, groups;
  int64_t softplus;
  void* state;
  Dtype state_dtype;
  int64_t state_batch, state_head, state_row, state_column;
  struct Input {  // [batch, heads, dim]
    const void* data;
    Dtype dtype;
    int64_t batch, head, row;
  } x, dt, z, D, bias;
  const void* A;  // float32
  int64_t A_head, A_row, A_column;
  View B, C;  // [batch, group, state]
  void* out;  // [batch, heads, dim], contiguous, in x's dtype
};

struct Kernels {
  Kernel<ScanForward> forward;
  Kernel<ScanBackward> backward;
  Kernel<Update> update;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace scan
}  // namespace cvmk
