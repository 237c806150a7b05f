// kd_loss, forward: one block a row. Bytes limit it: both logits are read once (a mixture's twice, the second time mostly from the cache), and
// of exponentials, the next limit, there are two a vocabulary entry at T = 1 and three elsewhere, each one instruction. Every thread keeps sums
// relative to the greatest logit that it has met, so one pass suffices; 16 bytes of each tensor are under way per thread.
#include <type_traits>

#include "distill/cuda_kd_rows.cuh"

namespace cvmk::distill {
namespace {

using namespace cvmk::cuda;

// As Sums in losses.inl: at_one sum exp(s - top_s), at_t sum exp((s - top_s) / T), teacher sum exp((t - top_t) / T), cross the divergence's own
// sum; logits and count of the entries that are not -inf, for label smoothing.
struct Sums {
  float top_s = -FLT_MAX, top_t = -FLT_MAX;
  float at_one = 0, at_t = 0, teacher = 0, cross = 0, logits = 0, count = 0;
};

__device__ inline float rescaled(float sum, float factor) { return factor == 0.0f ? 0.0f : sum * factor; }

// Makes the sums relative to greater logits. `scale` is log2(e) / T.
template <int kDivergence, bool kAtOne>
__device__ __forceinline__ void raise(Sums& sums, float top_s, float top_t, float scale) {
  if (top_s > sums.top_s) {
    const float fall = sums.top_s - top_s, factor = exp2_fast(fall * scale);
    sums.at_t = rescaled(sums.at_t, factor);
    if (!kAtOne) sums.at_one = rescaled(sums.at_one, exp2_fast(fall * kLog2e));
    if (kDivergence == kReverseKl) sums.cross = rescaled(sums.cross, factor);
    sums.top_s = top_s;
  }
  if (kDivergence != kNoDivergence && top_t > sums.top_t) {
    const float factor = exp2_fast((sums.top_t - top_t) * scale);
    sums.teacher = rescaled(sums.teacher, factor);
    if (kDivergence == kForwardKl) sums.cross = rescaled(sums.cross, factor);
    sums.top_t = top_t;
  }
}

template <int kCount>
__device__ __forceinline__ float greatest(const float (&values)[kCount], float top) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = fmaxf(top, values[i]);
  return top;
}

template <int kDivergence, bool kAtOne, int kCount>
__device__ __forceinline__ void add(Sums& sums, const float (&s)[kCount], const float (&t)[kCount], float scale, bool smoothing) {
  raise<kDivergence, kAtOne>(sums, greatest(s, sums.top_s), kDivergence == kNoDivergence ? 0.0f : greatest(t, sums.top_t), scale);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float a = s[i] - sums.top_s, e = exp2_fast(a * scale);
    sums.at_t += e;
    if (!kAtOne) sums.at_one += exp2_fast(a * kLog2e);
    if (kDivergence != kNoDivergence) {
      const float w = exp2_fast((t[i] - sums.top_t) * scale);
      sums.teacher += w;
      sums.cross += Formulas<kDivergence>::first_pass(e, w, s[i], t[i]);
    }
    if (smoothing && s[i] != -INFINITY) {
      sums.logits += s[i];
      sums.count += 1.0f;
    }
  }
}

// The sums of the whole row, the same in every thread.
template <int kDivergence, bool kAtOne>
__device__ void join(Sums& sums, float scale, float* scratch) {
  float tops[2] = {sums.top_s, sums.top_t};
  block_reduce<Max>(tops, scratch);
  raise<kDivergence, kAtOne>(sums, tops[0], tops[1], scale);
  float totals[6] = {sums.at_t, sums.at_one, sums.teacher, sums.cross, sums.logits, sums.count};
  block_reduce<Sum>(totals, scratch);
  sums = {tops[0], tops[1], kAtOne ? totals[0] : totals[1], totals[0], totals[2], totals[3], totals[4], totals[5]};
}

template <typename T, int kDivergence, bool kAtOne>
__global__ void __launch_bounds__(512, 2) row_losses(const CudaKdLoss p) {
  const CudaRows& in = p.in;
  const int64_t row = blockIdx.x, y = target_of(in, row);
  float* const stats = in.stats + row;
  if (y == in.ignore_index) {
    if (threadIdx.x < 5) stats[threadIdx.x * in.rows] = 0.0f;
    if (threadIdx.x == 0) p.kd_rows[row] = p.ce_rows[row] = 0.0f;
    return;
  }
  float* const scratch = shared_memory<float>();
  const T* const student = static_cast<const T*>(in.student) + row * in.student_stride;
  const T* const teacher = static_cast<const T*>(in.teacher) + row * in.teacher_stride;
  const bool together = kDivergence != kNoDivergence && shift_of(student) == shift_of(teacher);
  const float temperature = in.terms.temperature, scale = kLog2e / temperature;

  Sums sums;
  each_vector(student, in.vocabulary, [&](int64_t first) {
    float s[kVector<T>], t[kVector<T>];
    load_logits(student, true, first, in.vocabulary, s);
    if (kDivergence != kNoDivergence) load_logits(teacher, together, first, in.vocabulary, t);
    add<kDivergence, kAtOne>(sums, s, t, scale, in.terms.smoothing > 0);
  });
  join<kDivergence, kAtOne>(sums, scale, scratch);

  const double inverse = 1.0 / static_cast<double>(temperature), top_s = sums.top_s, top_t = sums.top_t;
  const double lse = top_s + static_cast<double>(logf(sums.at_one));
  const double lse_q = kAtOne ? lse : top_s * inverse + static_cast<double>(logf(sums.at_t));
  double lse_p = 0, value = 0, reduction = 0;
  if (kDivergence != kNoDivergence) lse_p = top_t * inverse + static_cast<double>(logf(sums.teacher));
  if (kDivergence == kForwardKl) value = static_cast<double>(sums.cross) / static_cast<double>(sums.teacher) * inverse - lse_p + lse_q;
  if (kDivergence == kReverseKl) value = reduction = static_cast<double>(sums.cross) / static_cast<double>(sums.at_t) * inverse - lse_q + lse_p;
  if (Formulas<kDivergence>::kMixture) {
    const float q_lse = static_cast<float>(lse_q), p_lse = static_cast<float>(lse_p), over = 1.0f / temperature;
    float both[2] = {0.0f, 0.0f};
    each_vector(student, in.vocabulary, [&](int64_t first) {
      float s[kVector<T>], t[kVector<T>];
      load_logits(student, true, first, in.vocabulary, s);
      load_logits(teacher, together, first, in.vocabulary, t);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        const float log_q = s[i] * over - q_lse, log_p = t[i] * over - p_lse;
        float x, second;
        Formulas<kDivergence>::terms(log_q, log_p, exp2_fast(log_q * kLog2e), exp2_fast(log_p * kLog2e), in.terms.mixture, x, second);
        both[0] += x;
        both[1] += second;
      }
    });
    block_reduce<Sum>(both, scratch);
    Formulas<kDivergence>::from_terms(in.terms.mixture, both[0], both[1], value, reduction);
  }
  if (threadIdx.x != 0) return;
  const double smoothing = in.terms.smoothing;
  const float at_target = y >= 0 && y < in.vocabulary ? widen(student[y]) : NAN;
  double entropy = lse - (1 - smoothing) * static_cast<double>(at_target);
  if (smoothing > 0) entropy -= smoothing / static_cast<double>(sums.count) * static_cast<double>(sums.logits);
  p.kd_rows[row] = static_cast<float>(value);
  p.ce_rows[row] = static_cast<float>(entropy);
  stats[0] = static_cast<float>(lse);
  stats[in.rows] = static_cast<float>(lse_q);
  stats[2 * in.rows] = static_cast<float>(lse_p);
  stats[3 * in.rows] = static_cast<float>(reduction);
  stats[4 * in.rows] = sums.count;
}

// One block: sums over the rows in double precision, in an order that depends on their number only.
__global__ void __launch_bounds__(512) totals(const CudaKdLoss p) {
  double* const scratch = shared_memory<double>();
  double sums[3] = {0, 0, 0};
  for (int64_t row = threadIdx.x; row < p.in.rows; row += blockDim.x) {
    sums[0] += static_cast<double>(p.kd_rows[row]);
    sums[1] += static_cast<double>(p.ce_rows[row]);
    sums[2] += target_of(p.in, row) == p.in.ignore_index ? 0.0 : 1.0;
  }
  block_reduce<Sum>(sums, scratch);
  if (threadIdx.x != 0) return;
  const double divisor = p.normalizer != nullptr ? static_cast<double>(*p.normalizer) : fmax(sums[2], 1.0);
  const double t = p.in.terms.temperature, alpha = p.in.alpha, kd = t * t * sums[0] / divisor, ce = sums[1] / divisor;
  *p.kd = static_cast<float>(kd);
  *p.ce = static_cast<float>(ce);
  *p.count = static_cast<float>(divisor);
  // A part of weight 0 is left out, for it may be infinite.
  *p.loss = static_cast<float>(alpha == 0 ? ce : alpha == 1 ? kd : alpha * kd + (1 - alpha) * ce);
}

}  // namespace

cudaError_t cuda_kd_loss(const CudaKdLoss& p, cudaStream_t stream) {
  const CudaRows& in = p.in;
  cudaError_t status = cudaSuccess;
  if (in.rows > 0) {
    status = with_type(in.dtype, [&](auto element) {
      using T = decltype(element);
      return with_divergence(in.teacher != nullptr, in.terms.divergence, [&](auto divergence) {
        constexpr int kDivergence = decltype(divergence)::value;
        const unsigned threads = threads_for(in.vocabulary, kVector<T>);
        constexpr bool kOnce = kDivergence == kNoDivergence;  // the others are seldom run at T = 1 alone
        const bool at_one = kDivergence == kForwardKl && in.terms.temperature == 1.0f;
        const auto kernel = at_one ? row_losses<T, kDivergence, (kOnce || kDivergence == kForwardKl)> : row_losses<T, kDivergence, kOnce>;
        return launch(kernel, dim3(static_cast<unsigned>(in.rows)), threads, 6 * 32 * sizeof(float), stream, p);
      });
    });
  }
  return status != cudaSuccess ? status : launch(totals, dim3(1), 512, 3 * 32 * sizeof(double), stream, p);
}

}  // namespace cvmk::distill
