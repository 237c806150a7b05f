// The kernels of the CUDA library as a Python module that runs them on the CPU, on_cpu.h says how; for tests.
#include <pybind11/pybind11.h>

#include "on_cpu.h"

void bind_cuda_distill(pybind11::module_& m);
void bind_cuda_gemm(pybind11::module_& m);
void bind_cuda_scan(pybind11::module_& m);

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.def("set_order", [](int order) { on_cpu::set_order(static_cast<on_cpu::Order>(order)); }, "How the threads of a block run: 0 ascending, 1 descending, 2 shuffled");
  bind_cuda_distill(m);
  bind_cuda_gemm(m);
  bind_cuda_scan(m);
}
