// int4_linear on vectors: weights of a few outputs in float32, dot products over vectors of inputs. Any dtype, any level.
#pragma once
#include "gemm/common.inl"
#include "gemm/int4_weight.inl"

namespace cvmk::gemm {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotOutputs = 4;
#else
constexpr int kDotRows = 2, kDotOutputs = 2;
#endif

// sums [rows][outputs][lanes] += x [rows][count] w [outputs][kBlock]^T, a lane for the inputs of its remainder.
template <int kRows>
inline void dot_block(const float* x, int64_t x_stride, const float* w, int64_t count, float* sums, int64_t stride) {
  F sum[kRows][kDotOutputs];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kDotOutputs; ++c) sum[r][c] = simd::load(sums + r * stride + c * kLanes);
  for (int64_t k = 0; k < count; k += kLanes) {
    F b[kDotOutputs];
#pragma GCC unroll 4
    for (int c = 0; c < kDotOutputs; ++c) b[c] = simd::load(w + c * kBlock + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F a = simd::load(x + r * x_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < kDotOutputs; ++c) sum[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kDotOutputs; ++c) simd::store(sums + r * stride + c * kLanes, sum[r][c]);
}

constexpr int64_t kDotRowsAtOnce = 32;

// `sums` has room for [rows][16][lanes] floats and the item's [rows][count * 16] behind them.
inline void vector_item(const Int4Linear& p, const Item& item, const float* x, int64_t row, int64_t rows, float* sums) {
  const int64_t inputs = p.linear.inputs, stride = kPanel * kLanes, out_stride = item.count * kPanel;
  float* out = sums + kDotRowsAtOnce * stride;
  float w[kDotOutputs * kBlock];
  for (int i = 0; i < item.count; ++i) {
    memset(sums, 0, static_cast<size_t>(rows * stride) * sizeof(float));
    for (int64_t k = 0; k < inputs; k += kBlock) {
      const int64_t n = least(kBlock, inputs - k);
      for (int c = 0; c < kPanel; c += kDotOutputs) {
        for (int j = 0; j < kDotOutputs; ++j) dequantise(p, item.panels[i], c + j, k / kBlock, n, w + j * kBlock);
        int64_t r = 0;
        for (; r + kDotRows <= rows; r += kDotRows) dot_block<kDotRows>(x + r * inputs + k, inputs, w, n, sums + r * stride + c * kLanes, stride);
        for (; r < rows; ++r) dot_block<1>(x + r * inputs + k, inputs, w, n, sums + r * stride + c * kLanes, stride);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < kPanel; ++c) out[r * out_stride + i * kPanel + c] = simd::sum(simd::load(sums + r * stride + c * kLanes));
  }
  finish(p.linear, item, static_cast<const float*>(out), out_stride, nullptr, row, rows);
}

// -- the whole -----------------------------------------------------------------------------------------------------------------------
// A row of x in stored order, as floats.
template <Dtype kType>
inline void float_row(const Int4Linear& p, const void* x, float* to) {
  const int64_t inputs = p.linear.inputs;
  if (!p.order) {
    for (int64_t k = 0; k < inputs; k += kLanes) simd::store(to + k, load_as<kType>(x, k));
    return;
  }
  for (int64_t k = 0; k < inputs; ++k) {
    if (kType == kFloat32) {
      to[k] = static_cast<const float*>(x)[p.order[k]];
    } else {
      const uint16_t h = static_cast<const uint16_t*>(x)[p.order[k]];
      to[k] = kType == kBFloat16 ? simd::bits<float>(static_cast<uint32_t>(h) << 16) : simd::half_to_float(h);
    }
  }
}

inline void copy_row(const Int4Linear& p, int64_t row, float* to) {
  const Linear& l = p.linear;
  const char* from = static_cast<const char*>(l.x) + row * l.x_stride * size_of(l.x_dtype);
  if (l.x_dtype == kFloat32) float_row<kFloat32>(p, from, to);
  else if (l.x_dtype == kBFloat16) float_row<kBFloat16>(p, from, to);
  else float_row<kFloat16>(p, from, to);
}

struct VectorPlan {
  int width, threads;
  int64_t round, items, sums_each;
  float *x, *sums;

  VectorPlan(const Linear& l, const Team& team, Arena* arena) {
    width = l.activation == kSwiglu ? 1 : 2;
    threads = l.rows * l.inputs * l.outputs <= (1 << 17) ? 1 : team.size;
    round = least(l.rows, kDotRowsAtOnce);
    items = pieces(out_columns(l), width * kPanel);
    sums_each = up(kDotRowsAtOnce * kPanel * (kLanes + 2 * width + 1), 16);
    x = arena->take<float>(round * l.inputs);
    sums = arena->take<float>(threads * sums_each);
  }
};

inline int64_t vectors_scratch(const Int4Linear& p, const Team& team) {
  Arena count;
  VectorPlan(p.linear, team, &count);
  return count.used;
}

inline void on_vectors(const Int4Linear& p, char* scratch, const Team& team) {
  const Linear& l = p.linear;
  Arena arena{scratch};
  const VectorPlan plan(l, team, &arena);
  const auto nothing = [] {};
  for (int64_t start = 0; start < l.rows; start += plan.round) {
    const int64_t rows = least(plan.round, l.rows - start);
    const auto copy = [&](int64_t r) { copy_row(p, start + r, plan.x + r * l.inputs); };
    const bool shared = rows * l.inputs > 16384;
    for (int64_t r = 0; !shared && r < rows; ++r) copy(r);
    const auto one = [&](int64_t i, int thread) {
      vector_item(p, item_of(l, i * plan.width * kPanel, plan.width), plan.x, start, rows, plan.sums + thread * plan.sums_each);
    };
    team.two_loops(plan.threads, shared ? rows : 0, copy, plan.items, nothing, one, nothing);
  }
}

}  // namespace
}  // namespace cvmk::gemm
