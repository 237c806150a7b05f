// Binds the CUDA kernels of kd_loss. Numbers come as one flat sequence of integers, in the order in which they are read here, and floats apart.
#include "bindings/cuda_call.h"
#include "distill/cuda_kd.h"

namespace py = pybind11;

namespace {

using namespace cvmk::distill;

// Braces and assignments order the reads as they are written.
CudaRows rows(Reader& r, float temperature, float alpha, float mixture, float smoothing) {
  CudaRows in{};
  in.student = r.pointer<const void>();
  in.student_stride = r.next();
  in.teacher = r.pointer<const void>();
  in.teacher_stride = r.next();
  in.type = r.integer();
  in.target = r.pointer<const void>();
  in.wide = r.next() != 0;
  in.rows = r.next();
  in.vocabulary = r.next();
  in.ignore_index = r.next();
  in.terms = {temperature, r.integer(), mixture, smoothing};
  in.alpha = alpha;
  in.stats = r.pointer<float>();
  return in;
}

void loss(const py::tuple& values, float temperature, float alpha, float mixture, float smoothing) {
  Reader r(values);
  const Place place(r);
  CudaKdLoss p{};
  p.in = rows(r, temperature, alpha, mixture, smoothing);
  p.normalizer = r.pointer<const float>();
  for (float** result : {&p.kd_rows, &p.ce_rows, &p.loss, &p.kd, &p.ce, &p.count}) *result = r.pointer<float>();
  r.finish();
  queue(&cuda_kd_loss, p, place);
}

void gradient(const py::tuple& values, float temperature, float alpha, float mixture, float smoothing) {
  Reader r(values);
  const Place place(r);
  CudaKdGradient p{};
  p.in = rows(r, temperature, alpha, mixture, smoothing);
  for (const float** given : {&p.count, &p.g_loss, &p.g_kd, &p.g_ce}) *given = r.pointer<const float>();
  p.gradient = r.pointer<void>();
  r.finish();
  queue(&cuda_kd_gradient, p, place);
}

}  // namespace

void bind_cuda_distill(py::module_& m) {
  m.def("kd_loss", &loss, "Forward pass of kd_loss");
  m.def("kd_loss_gradient", &gradient, "Backward pass of kd_loss");
}
