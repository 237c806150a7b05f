// How bindings call a CUDA kernel: on a device and a stream that come as integers, with its error as an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/reader.h"
#include "common/cuda_launch.cuh"

// The device and the stream of a call, its first two integers.
struct Place {
  int device;
  cudaStream_t stream;
  explicit Place(Reader& r) : device(r.integer()), stream(r.pointer<std::remove_pointer_t<cudaStream_t>>()) {}
};

// Queues kernel(p, stream): nothing waits for the device.
template <typename Arguments>
void queue(cudaError_t (*kernel)(const Arguments&, cudaStream_t), const Arguments& p, const Place& place) {
  const cvmk::cuda::OnDevice on(place.device);
  const cudaError_t status = on.status() != cudaSuccess ? on.status() : kernel(p, place.stream);
  if (status != cudaSuccess) throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + cudaGetErrorString(status));
}
