// Binds the CUDA kernels of kd_loss: the stream, then the arguments in the order in which they are read here.
#include "bindings/cuda_call.h"
#include "bindings/distill_arguments.h"
#include "distill/cuda_kd.h"

namespace {

using namespace cvmk;
using namespace cvmk::distill;

// student, teacher, target, ignore_index, alpha, terms, stats
CudaRows rows(Arguments& in) {
  CudaRows r{};
  const Tensor student = in.tensor("student");
  const Logits z = read_logits(in, student, "student"), t = read_logits(in, in.optional("teacher"), "teacher");
  const Tensor target = in.tensor("target");
  target.expect(1, "target");
  r.student = z.data;
  r.student_stride = z.stride;
  r.teacher = t.data;
  r.teacher_stride = t.stride;
  r.dtype = z.dtype;
  r.target = target.data();
  r.target_dtype = in.counting(target, "target");
  r.rows = target.size(0);
  r.vocabulary = student.size(1);
  r.ignore_index = in.integer();
  r.alpha = in.number();
  r.terms = read_terms(in);
  r.stats = in.data_of<float>(in.tensor("stats"), kFloat32, "stats");
  return r;
}

void loss(Arguments& in) {
  const Stream stream = in.integer();
  CudaKdLoss p{};
  p.in = rows(in);
  p.normalizer = read_one(in, "normalizer");
  for (float** result : {&p.kd_rows, &p.ce_rows, &p.loss, &p.kd, &p.ce, &p.count}) *result = read_one(in, "a result");
  cvmk::bindings::queue(&cuda_kd_loss, in, p, stream);
}

void gradient(Arguments& in) {
  const Stream stream = in.integer();
  CudaKdGradient p{};
  p.in = rows(in);
  for (const float** given : {&p.count, &p.g_loss, &p.g_kd, &p.g_ce}) *given = read_one(in, "the gradient of a result");
  p.gradient = in.tensor("the gradient").data();
  cvmk::bindings::queue(&cuda_kd_gradient, in, p, stream);
}

}  // namespace

void bind_cuda_distill(pybind11::module_& m) {
  using cvmk::bindings::add, cvmk::bindings::kGpu;
  add<&loss>(m, "kd_loss", "kd_loss", "Forward pass of kd_loss", kGpu);
  add<&gradient>(m, "kd_loss_gradient", "kd_loss", "Backward pass of kd_loss", kGpu);
}
