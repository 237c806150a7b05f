// Attention of a few rows over keys and values that stay where they were written, one position after the other.
#pragma once

#include <stdint.h>

#include "common/kernel.h"

namespace cvmk::cached {

constexpr int64_t kColumns = 16;  // a capacity is a multiple of this, and so is the width of a value

// Keys and values of one sequence and layer: keys turned, [kv_heads][d][capacity], so that scores of neighbouring keys are neighbours; values
// [kv_heads][capacity][up(d, kColumns)], the columns behind d being 0. Float32.
struct Cache {
  float *keys, *values;
  int64_t capacity;
};

// Rows that read the same `length` keys of a cache; a row's heads stand side by side, and rows q_stride and out_stride numbers apart.
struct Item {
  const float* q;
  float* out;
  int64_t rows, q_stride, out_stride;
  Cache cache;
  int64_t length;
  float* map;  // null, or [rows, length]: the weights' mean over the heads
};

// out = softmax(scale * q k) v; zeros where length is 0. `longest` is that of all items.
struct Attention {
  const Item* items;
  int64_t count, heads, kv_heads, d, longest;
  float scale;
};

// Positions first ... first + rows - 1 of a cache, from keys and values whose rows are `stride` apart, kv_heads * d numbers each.
struct Append {
  const float *keys, *values;
  int64_t stride, rows, first, kv_heads, d;
  Cache cache;
};

struct Kernels {
  Kernel<Attention> attention;
  Kernel<Append> append;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

// Numbers of a cache's keys and of its values.
CVMK_INLINE int64_t keys_size(int64_t kv_heads, int64_t d, int64_t capacity) { return kv_heads * d * capacity; }
CVMK_INLINE int64_t values_size(int64_t kv_heads, int64_t d, int64_t capacity) { return kv_heads * up(d, kColumns) * capacity; }

}  // namespace cvmk::cached
