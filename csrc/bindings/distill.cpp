// Binds the distillation losses.
#include "bindings/call.h"
#include "bindings/distill_arguments.h"
#include "common/pages.h"
#include "distill/loss.h"

namespace {

using namespace cvmk;
using namespace cvmk::distill;

// target, ignore_index, alpha, terms, stats
Loss read_loss(Arguments& in, std::int64_t vocabulary) {
  Loss call{};
  const Tensor target = in.tensor("target");
  target.expect(1, "target");
  call.target = target.data();
  call.target_dtype = in.counting(target, "target");
  call.rows = target.size(0);
  call.vocabulary = vocabulary;
  call.ignore_index = in.integer();
  call.alpha = in.real();
  call.terms = read_terms(in);
  call.stats = in.data_of<float>(in.tensor("stats"), kFloat32, "stats");
  return call;
}

Totals read_totals(Arguments& in) {
  Totals totals{};
  for (float** to : {&totals.loss, &totals.kd, &totals.ce, &totals.divisor}) *to = read_one(in, "a result");
  return totals;
}

Upstream read_upstream(Arguments& in) {
  Upstream upstream{};
  for (const float** from : {&upstream.loss, &upstream.kd, &upstream.ce}) *from = read_one(in, "the gradient of a result");
  return upstream;
}

void kd_loss_forward(Arguments& in) {
  const Tensor student = in.tensor("student");
  const Logits z = read_logits(in, student, "student"), t = read_logits(in, in.optional("teacher"), "teacher");
  const Loss call = read_loss(in, student.size(1));
  const float* const normalizer = read_one(in, "normalizer");
  const Totals totals = read_totals(in);
  const Tensor gradient = in.optional("the gradient");
  in.finish();
  const pybind11::gil_scoped_release release;
  kd_loss(call, z, t, normalizer, totals, gradient.data(), gradient ? gradient.stride(0) : 0, openmp_team());
}

void kd_loss_backward(Arguments& in) {
  const Tensor student = in.tensor("student");
  const Logits z = read_logits(in, student, "student"), t = read_logits(in, in.optional("teacher"), "teacher");
  const Loss call = read_loss(in, student.size(1));
  const Upstream upstream = read_upstream(in);
  const float* const divisor = read_one(in, "divisor");
  const Tensor gradient = in.tensor("the gradient");
  in.finish();
  const pybind11::gil_scoped_release release;
  kd_loss_gradient(call, z, t, upstream, divisor, gradient.data(), openmp_team());
}

// hidden, weight, bias of student or teacher; without hidden states there is no teacher.
Layer read_layer(Arguments& in, bool lowered) {
  Layer layer{};
  const Tensor hidden = in.optional("hidden"), weight = in.optional("weight"), bias = in.optional("bias");
  if (!hidden || !weight) return layer;
  const Logits rows = read_logits(in, hidden, "hidden"), matrix = read_logits(in, weight, "weight");
  layer.hidden = rows.data;
  layer.weight = matrix.data;
  layer.bias = bias.data();
  layer.width = hidden.size(1);
  layer.hidden_stride = rows.stride;
  layer.weight_stride = matrix.stride;
  layer.dtype = rows.dtype;
  layer.lowered = lowered;
  return layer;
}

void linear(Arguments& in) {
  const bool lowered = in.integer() != 0;
  const std::int64_t vocabulary = in.integer();
  const Layer student = read_layer(in, lowered), teacher = read_layer(in, lowered);
  const Loss call = read_loss(in, vocabulary);
  const float* const normalizer = read_one(in, "normalizer");
  const Upstream upstream = read_upstream(in);
  const float* const divisor = read_one(in, "divisor");
  const Totals totals = read_totals(in);
  LinearGradients gradients{};
  for (float** to : {&gradients.hidden, &gradients.weight, &gradients.bias}) *to = read_one(in, "a gradient");
  in.finish();
  const pybind11::gil_scoped_release release;
  linear_kd_loss(call, student, teacher, normalizer, upstream, divisor, totals, gradients, openmp_team());
}

void scaled(Arguments& in) {
  const Tensor from = in.tensor("from"), to = in.tensor("to");
  const std::int64_t count = in.integer();
  const float* const factor = read_one(in, "the factor");
  const ScalePass pass{in.data_of<float>(from, kFloat32, "from"), to.data(), in.floating(to, "to"), count, *factor};
  advise_large_pages(pass.to, count * size_of(pass.dtype));
  cvmk::bindings::run(kernels().scale, in, pass);
}

}  // namespace

void bind_distill(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&kd_loss_forward>(m, "kd_loss", "kd_loss",
                        "student, teacher; target, ignore_index, alpha, divergence, temperature, mixture, smoothing, stats; normalizer; loss, kd, ce, divisor; "
                        "the gradient of the loss by itself, or None");
  add<&kd_loss_backward>(m, "kd_loss_gradient", "kd_loss",
                         "student ... stats as for kd_loss; the gradients of loss, kd and ce; divisor; the gradient");
  add<&linear>(m, "linear_kd_loss", "linear_kd_loss",
               "lowered, vocabulary; hidden, weight, bias of student and teacher; target ... stats as for kd_loss; normalizer; the gradients of loss, kd and ce; "
               "divisor; loss, kd, ce, divisor; the gradients of hidden, weight and bias");
  add<&scaled>(m, "scaled", "linear_kd_loss", "from, to, count, factor: numbers times a factor, in another type");
}
