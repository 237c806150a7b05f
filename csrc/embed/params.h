// Rows of an embedding matrix by their ids, and the matrix's gradient.
#pragma once

#include <stdint.h>

#include "common/kernel.h"
#include "common/view.h"

namespace cvmk::embed {

// Row i of `out` [rows, n] is dropout(scale * weight[ids[i]] + positions[i % positions_rows]). Ids lie in 0 to vocabulary - 1. All of floating types but
// float64, `weight`, `out` and their gradients of one. Dropout as common/dropout.h has it: one group, rows and columns counted from 0.
struct Lookup {
  const void* ids;
  Dtype ids_dtype;
  int64_t rows, n, vocabulary;
  float scale, keep_factor;
  uint32_t dropout_key, dropout_limit;
};

struct Forward {
  Lookup lookup;
  Elements weight, positions, out;  // [vocabulary, n]; [positions_rows, n] or null
  int64_t positions_rows;
};

// Every row of `dweight` is written: scale * the sum of dropout(grad[i]) over the i with its id, in their order.
struct Backward {
  Lookup lookup;
  Elements grad, dweight;
};

struct Kernels {
  Kernel<Forward> forward;
  Kernel<Backward> backward;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::embed
