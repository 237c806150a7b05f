// What the quantised linear kernels take: pointers, sizes and strides, no torch. Layouts are described in cvmk/ops/native/_linear.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk::gemm {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3, kSwiglu = 4 };

constexpr int kPanel = 16;  // weight rows (outputs) of a panel
constexpr int kStep = 64;   // bytes of inputs in one row of a tile: 64 int8 or 32 bfloat16

struct Linear;

// Sums of a product on their way out: rows [row, row + rows) of the columns [column, column + columns), at most kPartColumns of them and, but for the last
// ones, a multiple of that. A row's come in rising columns.
constexpr int kPartColumns = 64;
struct Part {
  const Linear* linear;
  int64_t row, rows, column, columns;
  const void* sums;         // [rows][stride], int32 where row_scales are given, else float32
  int64_t stride;
  const float* row_scales;  // [rows], of int32 sums: a sum times its row's scale times linear->scales is the product; null: a sum is the product
};

// Takes what would be written to `out`; the activation is kNone.
struct Sink {
  void (*take)(void* context, const Part& part);
  void* context;
};

// What both linears share. Vectors of outputs that hold the weight's scales are padded with zeros to whole panels and one panel more.
struct Linear {
  const void* x;         // [rows, inputs], inputs contiguous
  int64_t x_stride;      // elements between rows
  void* out;             // [rows, outputs], contiguous; outputs / 2 columns for kSwiglu
  const void* bias;      // [outputs] or null
  const float* scales;
  int64_t rows, inputs, outputs;
  Dtype x_dtype, out_dtype, bias_dtype;
  int activation;
  const Sink* sink = nullptr;  // of the CPU's int8, int4_bytes and floats: takes the products in place of `out`
};

// Rows of float32 as bytes for any number of products with weights of `inputs` inputs; kernels_for sets what depends on the processor.
struct ByteRows {
  const float* x;  // [rows, inputs], contiguous
  int64_t rows, inputs;
  int64_t group;    // 0: for Int8Linear; else for Int4Bytes with so many inputs a group
  uint8_t* bytes;   // byte_rows_size(rows, inputs) of them
  float* scales;    // [rows]
  int32_t* sums;    // [rows, inputs / group], of the bytes of each group, where there are groups
  bool vnni;
  float range = 0;  // as Int8Linear's
};
CVMK_INLINE int64_t byte_rows_size(int64_t rows, int64_t inputs) { return up(rows, 32) * up(inputs, kStep); }

struct Int8Linear {
  Linear linear;
  const int8_t* weight;     // [panels][steps][16 quads of inputs][16 outputs][4 inputs], then int32 [panels * 16]: -128 * the row sums
  const int32_t* sums;       // the latter, where `weight` is a part of a weight that begins at a panel; null: behind the values
  const void* smooth_scale;  // [inputs] or null
  Dtype smooth_dtype;
  bool vnni;  // whether vpdpbusd may be used; kernels_for sets it
  const ByteRows* prepared = nullptr;  // the rows of x, where they are quantised already
  float range = 0;  // above 0: the magnitude that 127 stands for in all rows, larger ones saturate; else each row's largest
};

struct Int4Linear {
  Linear linear;  // scales [panels][groups][16]
  // [panels][blocks of 128 inputs][16 outputs][32 words of 16 bits]: nibble j of word i is input 32 j + i of the block.
  const uint16_t* weight;
  const uint8_t* zeros;   // [panels][groups][16] or null: then 8
  const int32_t* order;   // [inputs] or null: stored input k is x[order[k]]
  int64_t group;
};

// 4-bit weights, symmetric, by rows that are quantised to bytes as those of Int8Linear. x is float32; scales [panels][groups][16].
struct Int4Bytes {
  Linear linear;
  // [panels][inputs / 8][16 outputs][4]: byte i has input 8 s + i in its low half and 8 s + 4 + i in its high one, each value plus 8. Outputs behind the last
  // one have the scale 0.
  const uint8_t* weight;
  int64_t group;  // inputs of a scale, a multiple of 8 that divides the inputs
  bool vnni;      // kernels_for sets it
  const ByteRows* prepared = nullptr;  // the rows of x, where they are quantised already
};

constexpr int64_t kFloatPanel = 64;  // weight rows (outputs) of a panel of float_linear

// x is float32. Weight: [panels][inputs][kFloatPanel outputs], zeros behind the last output; for kSwiglu the gates fill panels of their own.
struct FloatLinear {
  Linear linear;  // no scales
  const void* weight;
  Dtype weight_dtype;  // kFloat32, kBFloat16 or kFloat16
};

struct Kernels {
  Kernel<Int8Linear> int8;
  Kernel<Int4Linear> int4;
  Kernel<FloatLinear> floats;
  Kernel<Int4Bytes> int4_bytes;
  Kernel<ByteRows> byte_rows;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

// The kernels for a call, in which it sets what depends on the processor.
const Kernels& kernels_for(Int8Linear& p);
const Kernels& kernels_for(Int4Bytes& p);
const Kernels& kernels_for(ByteRows& p);

}  // namespace cvmk::gemm
