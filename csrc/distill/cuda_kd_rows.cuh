// What both kernels of kd_loss share: rows read 16 bytes at a time wherever they begin, and the formulas of the divergences, one struct each.
#pragma once

#include "common/cuda_math.cuh"
#include "common/cuda_types.cuh"
#include "distill/cuda_kd.h"

namespace cvmk::distill {

constexpr int kNoDivergence = -1;

__device__ inline int64_t target_of(const CudaRows& in, int64_t row) {
  return integer_at(in.target, in.target_dtype, row);
}

// A row is read as vectors of 16 aligned bytes: vector v holds the elements [v * kVector - shift, ... + kVector). Elements before the row and
// behind it read as -inf, which counts nothing. `other` rows that do not lie as the first one does are read element by element.
template <typename T>
__device__ inline int shift_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}
template <typename T>
__device__ __forceinline__ void load_logits(const T* row, bool aligned, int64_t first, int64_t count, float (&out)[cuda::kVector<T>]) {
  constexpr int kVector = cuda::kVector<T>;
  if (aligned && first >= 0 && first + kVector <= count) return cuda::load_vector(row + first, out);
#pragma unroll
  for (int i = 0; i < kVector; ++i) out[i] = first + i >= 0 && first + i < count ? cuda::widen(row[first + i]) : -INFINITY;
}
template <typename T>
__device__ __forceinline__ void store_logits(const float (&values)[cuda::kVector<T>], T* row, bool aligned, int64_t first, int64_t count) {
  constexpr int kVector = cuda::kVector<T>;
  if (aligned && first >= 0 && first + kVector <= count) return cuda::store_vector(values, row + first);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (first + i >= 0 && first + i < count) cuda::narrow(values[i], row[first + i]);
}

// body(first element) for every vector of the row that is this thread's.
template <typename T, typename Body>
__device__ __forceinline__ void each_vector(const T* row, int64_t count, const Body& body) {
  constexpr int kVector = cuda::kVector<T>;
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * kVector - shift_of(row); first < count; first += static_cast<int64_t>(blockDim.x) * kVector) body(first);
}

__device__ inline float zero_where(bool condition, float x) { return condition ? 0.0f : x; }
// weight * a + (1 - weight) * b, never 0, so that its logarithm and inverse exist where both are.
__device__ inline float mix(float a, float b, float weight) { return fmaxf(b + weight * (a - b), FLT_MIN); }

// The divergence D(p, q) of one vocabulary entry. first_pass: what is summed beside the exponentials, from e = exp((s - top_s) / T),
// w = exp((t - top_t) / T) and the logits. terms: the two sums of a mixture's second pass. slope: dD/dq but for a constant a row.
template <int kDivergence>
struct Formulas {
  static constexpr bool kMixture = kDivergence == kJs || kDivergence == kSkewKl || kDivergence == kSkewReverseKl;

  static __device__ float first_pass(float e, float w, float s, float t) {
    if (kDivergence == kForwardKl) return w * zero_where(w == 0.0f, t - s);
    if (kDivergence == kReverseKl) return e * zero_where(e == 0.0f, s - t);
    return 0.0f;
  }

  static __device__ void terms(float log_q, float log_p, float q, float p, float weight, float& x, float& y) {
    const float mixed = kDivergence == kSkewReverseKl ? mix(q, p, weight) : mix(p, q, weight);
    const float log_m = logf(mixed);
    if (kDivergence == kSkewReverseKl) x = q * zero_where(q == 0.0f, log_q - log_m);
    else x = p * zero_where(p == 0.0f, log_p - log_m);
    if (kDivergence == kJs) y = q * zero_where(q == 0.0f, log_q - log_m);
    if (kDivergence == kSkewKl) y = q * (p / mixed);
    if (kDivergence == kSkewReverseKl) y = q * (q / mixed);
  }

  // D and the reduction R from the two sums.
  static __device__ void from_terms(double weight, double first, double second, double& value, double& reduction) {
    reduction = kDivergence == kJs ? (1 - weight) * second : kDivergence == kSkewKl ? (weight - 1) * second : first + 1 - weight * second;
    value = kDivergence == kJs ? weight * first + reduction : first;
  }

  // q (g - R), the gradient of the logits.
  static __device__ float gradient(float log_q, float log_p, float q, float p, float weight, float reduction) {
    if (kDivergence == kForwardKl) return q - p;
    float slope = 0.0f;
    if (kDivergence == kReverseKl) slope = zero_where(q == 0.0f, log_q - log_p);
    if (kDivergence == kJs) slope = zero_where(q == 0.0f, log_q - logf(mix(p, q, weight))) * (1.0f - weight);
    if (kDivergence == kSkewKl) slope = p / mix(p, q, weight) * (weight - 1.0f);
    if (kDivergence == kSkewReverseKl) {
      const float mixed = mix(q, p, weight);
      slope = zero_where(q == 0.0f, log_q - logf(mixed)) + 1.0f - q / mixed * weight;
    }
    return q * (slope - reduction);
  }
};

// launch(std::integral_constant<int, divergence>) for the divergence of the call.
template <typename Body>
auto with_divergence(bool teacher, int divergence, const Body& body) {
  if (!teacher) return body(std::integral_constant<int, kNoDivergence>());
  switch (divergence) {
    case kReverseKl: return body(std::integral_constant<int, kReverseKl>());
    case kJs: return body(std::integral_constant<int, kJs>());
    case kSkewKl: return body(std::integral_constant<int, kSkewKl>());
    case kSkewReverseKl: return body(std::integral_constant<int, kSkewReverseKl>());
    default: return body(std::integral_constant<int, kForwardKl>());
  }
}

// Threads of a block: a row of few vectors does not pay for the reductions of many warps.
inline unsigned threads_for(int64_t vocabulary, int64_t vector) {
  const int64_t vectors = (vocabulary + vector - 1) / vector;
  return vectors <= 256 ? 64 : vectors <= 1024 ? 128 : vectors <= 4096 ? 256 : 512;
}

}  // namespace cvmk::distill
