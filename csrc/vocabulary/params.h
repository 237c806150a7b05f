// Rows of logits that come piece by piece: their largest and the logarithm of the sum of their exponentials, without a row as wide as the vocabulary.
#pragma once

#include <stdint.h>

#include "common/kernel.h"

namespace cvmk::vocabulary {

constexpr int64_t kSorted = 64;  // the most that are kept in order; more are kept as a heap

// What is known of a row. Before the first piece: maximum -inf, sum 0, count 0.
struct Row {
  float maximum;     // of all logits so far
  double sum;        // of exp(logit - maximum)
  int64_t k, count;  // how many are wanted, and how many of `values` and `ids` are filled
  float* values;     // [k] the largest logits that may be chosen, falling and equal ones by id; in any order where k is above kSorted
  int32_t* ids;      // [k]
};

// One piece: logits [rows, n] of the ids first ... first + n - 1, which follow those of the piece before; row r begins at logits + r * stride.
struct Piece {
  const float* logits;
  int64_t rows, n, stride, first;
  Row* state;  // [rows]
  // Ids of row r that count in the sum and may not be chosen: forbidden[offsets[r]] ... forbidden[offsets[r + 1] - 1], rising. Both may be null.
  const int32_t* forbidden;
  const int64_t* offsets;
};

struct Kernels {
  Kernel<Piece> top_k;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::vocabulary
