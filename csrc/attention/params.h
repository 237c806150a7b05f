// What one call of attention works on. Sizes count elements, strides too; the last dimension of every matrix is contiguous.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk {
namespace attention {

// [batch, heads, rows, n]; packed sequences have a batch stride of 0.
struct Matrix {
  void* data;
  int64_t batch, head, row;
};

// A vector of kInt32 or kInt64; data is null where there is none.
struct Integers {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

// Broadcast to [batch, heads, rows, keys] by strides of 0; data is null where there is none. grad is fresh and contiguous, of the
// sizes given (1 where broadcast), in the dtype of the bias.
struct Bias {
  const void* data;
  void* grad;
  Dtype dtype;
  int64_t stride[4], size[4];
};

// The teacher of a distillation, in the dtype of the student: its maps are compared with those of the student's heads, group by group
// (gcd of the head counts), each student head with the mean of its group's teacher heads. heads 0: no teacher. There is no bias with one.
struct Teacher {
  int64_t heads, kv_heads, d, groups;
  Matrix q, k, lse;      // lse: float32 [batch, heads, rows]
  Matrix kl, grad_kl;    // float32 [batch, student's heads, rows]; data null: none
  float scale;
};

struct Params {
  Dtype dtype;                 // of q, k, v, out and their gradients: kFloat32, kBFloat16 or kFloat16
  int64_t batch, heads, kv_heads, rows, keys, d, dv;  // packed: batch 1, rows and keys are the totals
  int64_t sequences;           // packed sequences, whose offsets rise within the tensors, or -1
  Matrix q, k, v, out, lse;    // lse: float32, row stride 1, [batch, heads, rows]
  Matrix grad_out, grad_lse;   // data null: no gradient
  Matrix dq, dk, dv_;          // data null: not wanted
  Bias bias;
  Integers key_lengths, query_start, cu_q, cu_k;
  int64_t window_left, window_right;  // -1: no limit; else at most kFar
  float softcap, scale;
  float keep_factor;           // 1 / (1 - dropout_p)
  uint32_t dropout_key, dropout_limit;  // an element stays where its hash >= limit; limit 0: no dropout
  Teacher teacher;
};

// Farther than any key, and small enough that sums of two such numbers and a row's are no overflow.
constexpr int64_t kFar = int64_t{1} << 61;

// forward: out and lse from q, k and v. backward: the gradients whose matrices are given, from out, lse and the gradients of both; and that of
// the bias, where bias.grad is given.
struct Kernels {
  Kernel<Params> forward, backward;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();
// For calls of this type: the amx level has kernels of its own for bfloat16 only.
const Kernels& kernels(Dtype dtype);

}  // namespace attention
}  // namespace cvmk
