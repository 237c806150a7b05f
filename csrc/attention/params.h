// What one call of attention works on. Sizes count elements, strides too; the last dimension of every matrix is contiguous.
#pragma once

#include <stdint.h>

namespace cvmk {
namespace attention {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// [batch, heads, rows, n]; packed sequences have a batch stride of 0.
struct Matrix {
  void* data;
  int64_t batch, head, row;
};

// A vector of int32 or int64 (wide); data is null where there is none.
struct Integers {
  const void* data;
  int64_t stride, wide;
};

// Broadcast to [batch, heads, rows, keys] by strides of 0; data is null where there is none. grad is fresh and contiguous, of the
// sizes given (1 where broadcast), in the dtype of the bias.
struct Bias {
  const void* data;
  void* grad;
  int64_t dtype;
  int64_t stride[4], size[4];
};

// The teacher of a distillation, in the dtype of the student: its maps are compared with those of the student's heads, group by group
// (gcd of the head counts), each student head with the mean of its group's teacher heads. heads 0: no teacher.
struct Teacher {
  int64_t heads, kv_heads, d, groups;
  Matrix q, k, lse;      // lse: float32 [batch, heads, rows]
  Matrix kl, grad_kl;    // float32 [batch, student's heads, rows]; data null: none
  float scale;
};

struct Params {
  int64_t dtype;               // of q, k, v, out and their gradients
  int64_t batch, heads, kv_heads, rows, keys, d, dv;  // packed: batch 1, rows and keys are the totals
  int64_t sequences;           // packed sequences, or -1
  Matrix q, k, v, out, lse;    // lse: float32, row stride 1, [batch, heads, rows]
  Matrix grad_out, grad_lse;   // data null: no gradient
  Matrix dq, dk, dv_;          // data null: not wanted
  Bias bias;
  Integers key_lengths, query_start, cu_q, cu_k;
  int64_t window_left, window_right;  // -1: no limit
  float softcap, scale;
  float keep_factor;           // 1 / (1 - dropout_p)
  uint32_t dropout_key, dropout_limit;  // an element stays where its hash >= limit; limit 0: no dropout
  Teacher teacher;
};

// Results of a call.
enum Status : int { kDone = 0, kNoMemory = 1 };

}  // namespace attention
}  // namespace cvmk
