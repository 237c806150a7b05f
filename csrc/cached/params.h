// Attention of a few rows over keys and values that stay where they were written, one position after the other.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk::cached {

constexpr int64_t kColumns = 16;  // positions of a block of keys; a capacity is a multiple of this, and so is the width of a value

// Keys and values of one sequence and layer.
// Float32: keys turned in blocks, [kv_heads][capacity / kColumns][d][kColumns], so that scores of neighbouring keys are neighbours and what a short sequence
// has stands together; values [kv_heads][capacity][up(d, kColumns)], the columns behind d being 0.
// Bfloat16: the same in pairs, for products of pairs: keys [kv_heads][capacity / kColumns][pieces(d, 2)][kColumns][2], neighbours in d side by side; values
// [kv_heads][capacity / 2][up(d, kColumns)][2], neighbouring positions side by side, the second of the last pair being 0 where there is none yet.
// Int8: a head's key and value of a position are each integers of -127 to 127 times a scale of their own. Keys, plus 128, in quads for products of bytes:
// [kv_heads][capacity / kColumns][pieces(d, 4)][kColumns][4]; values [kv_heads][capacity / 4][up(d, kColumns)][4], neighbouring positions side by side.
struct Cache {
  void *keys, *values;
  int64_t capacity;
  float* scales = nullptr;  // of int8: [2][kv_heads][capacity], the keys' and the values'; NaN where a key or value was not finite
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
  Dtype dtype;  // of the caches: kFloat32, kInt8, or kBFloat16, with which q and the weights are rounded to it before they are multiplied
  bool pairs = false, vnni = false;  // whether vdpbf16ps and vpdpbusd may be used; kernels_for sets them
};

// Positions first ... first + rows - 1 of a cache, from keys and values whose rows are `stride` apart, kv_heads * d numbers each.
struct Append {
  const float *keys, *values;
  int64_t stride, rows, first, kv_heads, d;
  Cache cache;
  Dtype dtype;  // of the cache
  bool pairs = false;  // kernels_for sets it
};

// Positions first ... last - 1 of a cache into another one of the same sizes; the block of keys that `first` stands in is copied from its beginning.
struct Copy {
  Cache from, to;
  int64_t first, last, kv_heads, d;
  Dtype dtype;
};

struct Kernels {
  Kernel<Attention> attention;
  Kernel<Append> append;
  Kernel<Copy> copy;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

// The kernels for a call, in which it sets what depends on the processor.
const Kernels& kernels_for(Attention& p);
const Kernels& kernels_for(Append& p);

// Numbers of a cache's keys and of its values.
CVMK_INLINE int64_t keys_size(int64_t kv_heads, int64_t d, int64_t capacity, Dtype dtype) { return kv_heads * up(d, dtype == kInt8 ? 4 : 2) * capacity; }
CVMK_INLINE int64_t values_size(int64_t kv_heads, int64_t d, int64_t capacity) { return kv_heads * up(d, kColumns) * capacity; }

// Bytes of a cache, and the cache that stands in so many.
CVMK_INLINE int64_t cache_bytes(int64_t kv_heads, int64_t d, int64_t capacity, Dtype dtype) {
  return (keys_size(kv_heads, d, capacity, dtype) + values_size(kv_heads, d, capacity)) * size_of(dtype) + (dtype == kInt8 ? 2 * kv_heads * capacity * 4 : 0);
}
CVMK_INLINE Cache cache_in(void* memory, int64_t kv_heads, int64_t d, int64_t capacity, Dtype dtype) {
  char *keys = static_cast<char*>(memory), *values = keys + keys_size(kv_heads, d, capacity, dtype) * size_of(dtype);
  char* scales = values + values_size(kv_heads, d, capacity) * size_of(dtype);
  return {keys, values, capacity, dtype == kInt8 ? reinterpret_cast<float*>(scales) : nullptr};
}

}  // namespace cvmk::cached
