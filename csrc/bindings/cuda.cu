// The module cvmk._native_cuda: the table of CUDA devices. It imports where there is no driver and no device.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

void bind_cuda_distill(py::module_& m);
void bind_cuda_gemm(py::module_& m);
void bind_cuda_scan(py::module_& m);

namespace {

// 1000 * major + 10 * minor of the newest CUDA version that the driver supports; 0 without a driver.
int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

// "" where there is at least one device, else why there is none.
std::string device_error() {
  if (driver_version() == 0) return "no NVIDIA driver is loaded";
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string(cudaGetErrorString(status)) + " (CUDA error " + std::to_string(static_cast<int>(status)) + ")";
  }
  return count > 0 ? "" : "the driver reports no CUDA device";
}

py::list devices() {
  py::list result;
  if (!device_error().empty()) return result;
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    py::dict entry;
    entry["index"] = index;
    const cudaError_t status = cudaGetDeviceProperties(&properties, index);
    if (status != cudaSuccess) {
      entry["error"] = std::string(cudaGetErrorString(status));
    } else {
      entry["name"] = std::string(properties.name);
      entry["capability"] = std::to_string(properties.major) + "." + std::to_string(properties.minor);
      entry["memory_bytes"] = properties.totalGlobalMem;
      entry["multiprocessors"] = properties.multiProcessorCount;
    }
    result.append(entry);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of cvmk and the devices they can run on";
  m.def("devices", &devices, "One dict a device: index, name, capability, memory_bytes, multiprocessors (or error)");
  m.def("device_error", &device_error, "Why there is no device, or an empty string");
  m.def("driver_version", &driver_version, "The newest CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without a driver");
  bind_cuda_distill(m);
  bind_cuda_gemm(m);
  bind_cuda_scan(m);
  m.attr("runtime_version") = CUDART_VERSION;
  m.attr("version") = CVMK_VERSION;
}
