// How kernels are launched, and where their shared memory is. Compiled by nvcc, and by a C++ compiler with csrc/tests/cuda in place of CUDA.
#pragma once

#include <cuda_runtime.h>

#include <stddef.h>

#include <utility>

namespace cvmk::cuda {

// kernel<<<grid, threads, shared, stream>>>(arguments...), and its error. More than 48 KiB of shared memory must be asked for beforehand.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, Arguments&&... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t how{};
  how.gridDim = grid;
  how.blockDim = dim3(threads);
  how.dynamicSmemBytes = shared;
  how.stream = stream;
  return cudaLaunchKernelEx(&how, kernel, std::forward<Arguments>(arguments)...);
}

// The block's shared memory: as many bytes as the launch asked for, aligned to 16, with nothing in it.
template <typename T>
__device__ T* shared_memory() {
#if defined(CVMK_CUDA_ON_CPU)
  return static_cast<T*>(on_cpu::shared_memory());
#else
  extern __shared__ uint4 cvmk_shared[];
  return reinterpret_cast<T*>(cvmk_shared);
#endif
}

// Makes a device the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device_) status_ = cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int device_, before_ = 0;
  cudaError_t status_ = cudaSuccess;
};

}  // namespace cvmk::cuda
