// Recurrences over rows of channels, as mixers with a state of fixed size have them between their projections: in one pass over time, for one row of each of
// many sequences and for many rows of a few alike. Float32; every channel is computed by itself, so that its bits depend on nothing else.
#pragma once

#include <stdint.h>

#include "common/kernel.h"

namespace cvmk::recurrent {

// Rows of one sequence, next to one another in time, from its state before them to that behind them.
struct Run {
  int64_t first, rows;
  const float* from;  // null: zeros
  float* to;          // null: nobody asks; may be `from`, and the `from` of a later run
};

// What there is of each channel stands in blocks of kBlock channels, [pieces(channels, kBlock)][numbers][kBlock], so that a block is in one place.
constexpr int64_t kBlock = 16;

// Runs are worked off in their order. A block of their states has `pitch` numbers, of which those of this recurrence begin with number `state`; where
// channels end within a block, the others are anybody's. Reversed, each run begins with its last row.
struct Pass {
  const Run* runs;
  int64_t count, rows, channels, state, pitch;  // rows: of all runs
  bool reverse;
};

// Rows of a matrix, `stride` numbers apart.
struct Rows {
  const float* data;
  int64_t stride;
};

// f = sigmoid(gate), c = f c + (1 - f) value, out = relu(c) (Kim et al. 2019). State: c, one number a channel.
struct Ssru {
  Pass pass;
  Rows gates, values;
  float* out;
  int64_t out_stride;
};

constexpr int64_t kTaps = 4;     // of the filters of `Conv`
constexpr int64_t kStates = 16;  // of a channel of `Scan`

// out_t = silu(bias + sum_k weight_k x_{t + k - 3}). State: the last kTaps - 1 of x, the oldest first.
struct Conv {
  Pass pass;
  Rows x;
  const float *weight, *bias;  // kTaps numbers a channel, in blocks; [channels]
  float* out;
  int64_t out_stride;
};

// step = softplus(delta), s_n = exp(step A_n) s_n + step u B_n, out = (sum_n C_n s_n + D u) silu(z) (Gu and Dao 2023). State: s, kStates numbers a channel.
struct Scan {
  Pass pass;
  Rows u, delta, z;
  Rows B, C;           // [rows, kStates]
  const float *A, *D;  // kStates numbers a channel, in blocks; [channels]
  float* out;          // may be u
  int64_t out_stride;
};

struct Kernels {
  Kernel<Ssru> ssru;
  Kernel<Conv> conv;
  Kernel<Scan> scan;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::recurrent
