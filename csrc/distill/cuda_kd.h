// What the CUDA kernels of kd_loss are given; cvmk/ops/kd_loss.py derives the formulas. All pointers are of the device.
#pragma once

#include <cuda_runtime.h>

#include "distill/params.h"

namespace cvmk::distill {

// Rows of logits, both of one type, and their targets.
struct CudaRows {
  const void *student, *teacher;  // row i begins i strides further; no teacher is null
  int64_t student_stride, teacher_stride;
  Dtype dtype;         // of both
  const void* target;  // rows with ignore_index are not read
  Dtype target_dtype;  // kInt32 or kInt64
  int64_t rows, vocabulary, ignore_index;
  Terms terms;
  float alpha;
  float* stats;  // [5, rows], as Rows in params.h
};

struct CudaKdLoss {
  CudaRows in;
  const float* normalizer;           // null: the number of rows that count, at least 1
  float *kd_rows, *ce_rows;          // [rows]: scratch
  float *loss, *kd, *ce, *count;     // one number each
};

struct CudaKdGradient {
  CudaRows in;
  const float *count, *g_loss, *g_kd, *g_ce;  // one number each; a gradient that is not there is null
  void* gradient;                             // [rows, vocabulary], contiguous
};

cudaError_t cuda_kd_loss(const CudaKdLoss& p, cudaStream_t stream);
cudaError_t cuda_kd_gradient(const CudaKdGradient& p, cudaStream_t stream);

}  // namespace cvmk::distill
