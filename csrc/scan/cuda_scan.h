// The CUDA kernels of the selective scan: params.h says what they are given, with pointers of the device and unit strides along time.
#pragma once

#include <cuda_runtime.h>

#include "scan/params.h"

namespace cvmk::scan {

struct CudaBackward {
  ScanBackward pass;
  float* workspace;  // cuda_workspace() floats
};

// Floats of scratch that the backward pass needs for the gradients that it is asked for.
int64_t cuda_workspace(const ScanBackward& p);

cudaError_t cuda_forward(const ScanForward& p, cudaStream_t stream);
cudaError_t cuda_backward(const CudaBackward& p, cudaStream_t stream);
cudaError_t cuda_update(const Update& p, cudaStream_t stream);

}  // namespace cvmk::scan
