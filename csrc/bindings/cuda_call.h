// How bindings call a CUDA kernel: on the device of its tensors and a stream that comes as an integer, with its error as an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/tensor.h"
#include "common/cuda_launch.cuh"

namespace cvmk::bindings {

#if defined(CVMK_CUDA_ON_CPU)
constexpr Device kGpu = kCpu;
#else
constexpr Device kGpu = kCuda;
#endif

// The address of PyTorch's current stream: the first argument of a call.
struct Stream {
  cudaStream_t stream;
  Stream(std::int64_t address) : stream(reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(address))) {}
};

// Queues kernel(p, stream): nothing waits for the device.
template <typename Params>
void queue(cudaError_t (*kernel)(const Params&, cudaStream_t), const Arguments& in, const Params& p, Stream stream) {
  in.finish();
  const cuda::OnDevice on(in.device_index());
  const cudaError_t status = on.status() != cudaSuccess ? on.status() : kernel(p, stream.stream);
  if (status != cudaSuccess) throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + cudaGetErrorString(status));
}

}  // namespace cvmk::bindings

using cvmk::bindings::Stream;
