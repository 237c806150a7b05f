// Channels in parallel: one thread reads all rows of a channel in their order, so that the sums over rows have one order too.
#pragma once
#include "conv/rows.inl"

namespace cvmk::conv {
namespace {

CVMK_INLINE int64_t backward_threads(const Backward& p, const Team& team) {
  return threads_for(p.shape.dim, p.shape.batch * p.shape.dim * p.shape.length, team);
}

// A thread's buffers: p, the gradients d of what stands before the activation with width - 1 zeros on both sides, and dp.
int64_t backward_scratch(const Backward& p, const Team& team) {
  Arena count;
  count.take<float>(backward_threads(p, team) * 3 * buffer_size(p.shape));
  return count.used;
}

// d of one row behind width - 1 zeros, and zeros behind it.
inline void gradients_before_activation(const Backward& p, int64_t row, int64_t real, const float* inputs, float* d) {
  const Shape& s = p.shape;
  const int64_t channel = row % s.dim, front = s.width - 1;
  clear(d, buffer_size(s));
  if (p.grad_out.data == nullptr) return;
  const float* const weight = s.weight + channel * s.width;
  const float bias = bias_of(s.bias, channel);
  each_vector(real, [&](int64_t t, auto lanes) {
    F g = get<kNoDtype>(p.grad_out, row * s.length + t, lanes);
    if (s.silu) {
      const F y = filtered<0>(s, weight, bias, inputs, t), gate = activations::sigmoid(y);
      g *= gate * (1.0f + y * (1.0f - gate));
    }
    simd::store(d + front + t, g);
  });
  clear(d + front + real, least(kLanes, buffer_size(s) - front - real));  // the lanes behind the last step
}

// dp_j = sum_k weight_k d_{j-k}, and the gradient of the last state where it stands.
inline void gradients_of_inputs(const Backward& p, int64_t row, int64_t real, const float* d, float* dp) {
  const Shape& s = p.shape;
  const int64_t front = s.width - 1;
  const float* const weight = s.weight + row % s.dim * s.width;
  for (int64_t j = 0; j < real + front; j += kLanes) {
    F v{};
    for (int64_t k = 0; k < s.width; ++k) v += simd::set(weight[k]) * simd::load(d + front + j - k);
    simd::store(dp + j, v);
  }
  for (int64_t i = 0; i < 2 * front; ++i) {  // at both ends not all taps belong: their weights are not even multiplied by 0
    const int64_t j = i < front ? i : real + i - front;
    float v = 0.0f;
    for (int64_t k = most(0, j - real + 1); k <= least(front, j); ++k) v += weight[k] * d[front + j - k];
    dp[j] = v;
  }
  if (p.grad_last.data != nullptr)
    for (int64_t k = 0; k < front; ++k) dp[real + k] += elements::load_one(p.grad_last.data, p.grad_last.dtype, row * front + k);
  if (p.dbefore != nullptr)
    for (int64_t k = 0; k < front; ++k) p.dbefore[row * front + k] = dp[k];
  if (p.dx.data == nullptr) return;
  each_vector(real, [&](int64_t t, auto lanes) { put<kNoDtype>(p.dx, row * s.length + t, simd::load(dp + front + t), lanes); });
  const int64_t padded = (s.length - real) * size_of(p.dx.dtype);
  if (padded > 0) memset(elements::at(p.dx.data, p.dx.dtype, row * s.length + real), 0, static_cast<size_t>(padded));
}

// A sum of many rows' sums, and what rounding took from it (Kahan 1965).
struct Total {
  float whole = 0.0f, lost = 0.0f;
  CVMK_INLINE void add(float part) {
    const float more = part - lost, sum = whole + more;
    lost = sum - sum == 0.0f ? (sum - whole) - more : 0.0f;
    whole = sum;
  }
};

inline void backward_channel(const Backward& p, int64_t channel, float* buffers) {
  const Shape& s = p.shape;
  const int64_t size = buffer_size(s), front = s.width - 1;
  float *const inputs = buffers, *const d = inputs + size, *const dp = d + size;
  Total weights[kMaxWidth], bias;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t row = b * s.dim + channel, real = real_inputs(s, b);
    read_row<kNoDtype>(s, p.x, row, real, inputs);
    gradients_before_activation(p, row, real, inputs, d);
    for (int64_t k = 0; k < s.width && p.dweight != nullptr; ++k) {
      F sum{};
      int64_t t = 0;
      for (; t + kLanes <= real; t += kLanes) sum += simd::load(d + front + t) * simd::load(inputs + t + k);
      sum += simd::load(d + front + t) * simd::load_n(inputs + t + k, static_cast<int>(real - t));  // not NaN of later inputs times 0
      weights[k].add(simd::sum(sum));
    }
    if (p.dbias != nullptr) {
      F sum{};
      for (int64_t t = 0; t < real; t += kLanes) sum += simd::load(d + front + t);
      bias.add(simd::sum(sum));
    }
    if (p.dx.data != nullptr || p.dbefore != nullptr) gradients_of_inputs(p, row, real, d, dp);
  }
  for (int64_t k = 0; k < s.width && p.dweight != nullptr; ++k) p.dweight[channel * s.width + k] = weights[k].whole;
  if (p.dbias != nullptr) p.dbias[channel] = bias.whole;
}

void run_backward(const Backward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const int64_t threads = backward_threads(p, team), size = 3 * buffer_size(p.shape);
  float* const buffers = arena.take<float>(threads * size);
  team.share(threads, p.shape.dim, [&](int64_t first, int64_t last, int thread) {
    for (int64_t channel = first; channel < last; ++channel) backward_channel(p, channel, buffers + thread * size);
  });
}

}  // namespace
}  // namespace cvmk::conv
