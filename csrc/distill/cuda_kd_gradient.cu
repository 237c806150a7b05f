// kd_loss, backward: one block a row, from the statistics that the forward pass kept; both logits are read and the gradient is written, each
// once. Formulas: cvmk/ops/kd_loss.py.
#include <type_traits>

#include "distill/cuda_kd_rows.cuh"

namespace cvmk::distill {
namespace {

using namespace cvmk::cuda;

__device__ inline float value_or_zero(const float* number) { return number == nullptr ? 0.0f : *number; }

template <typename T, int kDivergence, bool kCe>
__global__ void __launch_bounds__(512, 2) row_gradients(const CudaKdGradient p) {
  const CudaRows& in = p.in;
  const Terms& terms = in.terms;
  const int64_t row = blockIdx.x, y = target_of(in, row);
  T* const out = static_cast<T*>(p.gradient) + row * in.vocabulary;
  float values[kVector<T>] = {};
  if (y == in.ignore_index) {
    each_vector(out, in.vocabulary, [&](int64_t first) { store_logits(values, out, true, first, in.vocabulary); });
    return;
  }
  constexpr bool kKd = kDivergence != kNoDivergence;
  const T* const student = static_cast<const T*>(in.student) + row * in.student_stride;
  const T* const teacher = static_cast<const T*>(in.teacher) + row * in.teacher_stride;
  const bool together = kKd && shift_of(student) == shift_of(teacher), out_together = shift_of(student) == shift_of(out);
  const float* const stats = in.stats + row;
  const float lse = stats[0], lse_q = stats[in.rows], lse_p = stats[2 * in.rows], reduction = stats[3 * in.rows];
  const float g_loss = value_or_zero(p.g_loss), count = *p.count, inverse = 1.0f / terms.temperature;
  const float kd_scale = terms.temperature * ((in.alpha == 0.0f ? 0.0f : in.alpha * g_loss) + value_or_zero(p.g_kd)) / count;
  const float ce_scale = ((in.alpha == 1.0f ? 0.0f : (1.0f - in.alpha) * g_loss) + value_or_zero(p.g_ce)) / count;
  const float shared = terms.smoothing > 0 ? ce_scale * (terms.smoothing / stats[4 * in.rows]) : 0.0f;
  const float at_target = (1.0f - terms.smoothing) * ce_scale;
  const bool at_one = terms.temperature == 1.0f;

  each_vector(student, in.vocabulary, [&](int64_t first) {
    float s[kVector<T>], t[kVector<T>];
    load_logits(student, true, first, in.vocabulary, s);
    if (kKd) load_logits(teacher, together, first, in.vocabulary, t);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      float grad = 0.0f, q = 0.0f;
      if (kKd) {
        const float log_q = s[i] * inverse - lse_q, log_p = t[i] * inverse - lse_p;
        q = exp2_fast(log_q * kLog2e);
        const float p_t = exp2_fast(log_p * kLog2e);
        grad = kd_scale * Formulas<kDivergence>::gradient(log_q, log_p, q, p_t, terms.mixture, reduction);
      }
      if (kCe) {
        grad += ce_scale * (kKd && at_one ? q : exp2_fast((s[i] - lse) * kLog2e));
        grad -= zero_where(s[i] == -INFINITY, shared);
        grad -= zero_where(first + i != y, at_target);
      }
      values[i] = grad;
    }
    store_logits(values, out, out_together, first, in.vocabulary);
  });
}

}  // namespace

cudaError_t cuda_kd_gradient(const CudaKdGradient& p, cudaStream_t stream) {
  const CudaRows& in = p.in;
  if (in.rows == 0) return cudaSuccess;
  const bool kd = in.teacher != nullptr && ((p.g_loss != nullptr && in.alpha != 0.0f) || p.g_kd != nullptr);
  const bool ce = (p.g_loss != nullptr && in.alpha != 1.0f) || p.g_ce != nullptr;
  return with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    return with_divergence(kd, in.terms.divergence, [&](auto divergence) {
      constexpr int kDivergence = decltype(divergence)::value;
      const auto kernel = ce ? row_gradients<T, kDivergence, true> : row_gradients<T, kDivergence, false>;
      return launch(kernel, dim3(static_cast<unsigned>(in.rows)), threads_for(in.vocabulary, kVector<T>), 0, stream, p);
    });
  });
}

}  // namespace cvmk::distill
