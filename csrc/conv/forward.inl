// Rows in parallel, each in one pass.
#pragma once
#include "conv/rows.inl"

namespace cvmk::conv {
namespace {

CVMK_INLINE int64_t forward_threads(const Forward& p, const Team& team) {
  return threads_for(p.shape.batch * p.shape.dim, p.shape.batch * p.shape.dim * p.shape.length, team);
}

int64_t forward_scratch(const Forward& p, const Team& team) {
  Arena count;
  count.take<float>(forward_threads(p, team) * buffer_size(p.shape));
  return count.used;
}

template <Dtype kX, int kWidth>
inline void forward_row(const Forward& p, int64_t row, float* inputs) {
  const Shape& s = p.shape;
  const int64_t channel = row % s.dim, real = real_inputs(s, row / s.dim), front = s.width - 1;
  read_row<kX>(s, p.x, row, real, inputs);
  const float* const weight = s.weight + channel * s.width;
  const float bias = bias_of(s.bias, channel);
  each_vector(real, [&](int64_t t, auto lanes) {
    F y = filtered<kWidth>(s, weight, bias, inputs, t);
    if (s.silu) y = activations::silu(y);
    put<kX>(p.out, row * s.length + t, y, lanes);
  });
  const int64_t padded = (s.length - real) * size_of(p.out.dtype);
  if (padded > 0) memset(elements::at(p.out.data, p.out.dtype, row * s.length + real), 0, static_cast<size_t>(padded));
  each_vector(front, [&](int64_t k, auto lanes) { put<kNoDtype>(p.last, row * front + k, simd::load(inputs + real + k), lanes); });
}

void run_forward(const Forward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const int64_t threads = forward_threads(p, team), size = buffer_size(p.shape);
  float* const buffers = arena.take<float>(threads * size);
  const bool usual = p.shape.width == 4;
  const auto each = p.x.dtype == kFloat32    ? (usual ? forward_row<kFloat32, 4> : forward_row<kFloat32, 0>)
                    : p.x.dtype == kBFloat16 ? (usual ? forward_row<kBFloat16, 4> : forward_row<kBFloat16, 0>)
                                             : forward_row<kNoDtype, 0>;
  team.share(threads, p.shape.batch * p.shape.dim, [&](int64_t first, int64_t last, int thread) {
    for (int64_t row = first; row < last; ++row) each(p, row, buffers + thread * size);
  });
}

}  // namespace
}  // namespace cvmk::conv
