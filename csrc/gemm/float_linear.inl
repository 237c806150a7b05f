// float_linear: products on vector registers, a panel of weights after the other, in parts of the depth that stay in the first cache. A row's sums
// have the same order however many rows there are.
#pragma once
#include "common/float_product.inl"
#include "gemm/common.inl"

namespace cvmk::gemm {
namespace {

constexpr int64_t kPart = 128;          // inputs of a part: 32 KiB of a panel
constexpr int64_t kFloatRows = 48;      // rows of a block
constexpr int64_t kFloatGrain = 1 << 17;  // multiplications below which the calling thread does the work

struct FloatPlan {
  int64_t panels, rows, each;
  int threads;
};

inline FloatPlan plan_float(const FloatLinear& p, const Team& team) {
  const Linear& l = p.linear;
  FloatPlan plan{};
  if (l.rows == 0) return plan;
  const bool gated = l.activation == kSwiglu;
  plan.panels = pieces(out_columns(l), kFloatPanel);
  plan.rows = least(kFloatRows, l.rows);
  plan.threads = static_cast<int>(least(l.rows * l.inputs * l.outputs <= kFloatGrain ? 1 : team.size, plan.panels));
  plan.each = up(((gated ? 2 : 1) * plan.rows * kFloatPanel + (p.weight_dtype == kFloat32 ? 0 : kPart * kFloatPanel)) * 4, 64);
  return plan;
}

// sums [rows][kFloatPanel] of the weight rows that a packed panel holds.
inline void float_panel(const FloatLinear& p, int64_t panel, int64_t row, int64_t rows, float* expanded, float* sums) {
  const Linear& l = p.linear;
  const float* x = static_cast<const float*>(l.x) + row * l.x_stride;
  for (int64_t k = 0; k < l.inputs; k += kPart) {
    const int64_t depth = least(kPart, l.inputs - k), at = (panel * l.inputs + k) * kFloatPanel;
    const float* weight = static_cast<const float*>(p.weight) + at;
    if (p.weight_dtype != kFloat32) {
      elements::to_floats(expanded, elements::at(p.weight, p.weight_dtype, at), p.weight_dtype, depth * kFloatPanel, depth * kFloatPanel);
      weight = expanded;
    }
    product::multiply(rows, kFloatPanel, depth, {x + k, l.x_stride, 1, depth, 0}, {weight, product::kPanel, kFloatPanel}, sums, kFloatPanel, k > 0);
  }
}

inline F activated(int activation, F y) {
  switch (activation) {
    case kRelu: return y < 0.0f ? F{} : y;
    case kGelu: return gelu(y);
    case kSilu: return silu(y);
    default: return y;
  }
}

// Sums, in the panel's columns and, where gated, those of `up`, to results.
inline void finish_floats(const FloatLinear& p, int64_t panel, int64_t row, int64_t rows, const float* sums, const float* up_sums) {
  const Linear& l = p.linear;
  const int64_t width = out_columns(l), first = panel * kFloatPanel, columns = least(kFloatPanel, width - first);
  if (l.sink != nullptr) return l.sink->take(l.sink->context, {&l, row, rows, first, columns, sums, kFloatPanel, nullptr});
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < columns; v += kLanes) {
      const int left = static_cast<int>(least(kLanes, columns - v));
      F y = simd::load(sums + r * kFloatPanel + v);
      if (l.bias != nullptr) y += elements::load_n(l.bias, l.bias_dtype, first + v, left);
      if (l.activation == kSwiglu) {
        F u = simd::load(up_sums + r * kFloatPanel + v);
        if (l.bias != nullptr) u += elements::load_n(l.bias, l.bias_dtype, width + first + v, left);
        y = silu(y) * u;
      } else {
        y = activated(l.activation, y);
      }
      elements::store_n(l.out, l.out_dtype, (row + r) * width + first + v, y, left);
    }
}

int64_t float_scratch(const FloatLinear& p, const Team& team) {
  const FloatPlan plan = plan_float(p, team);
  return plan.threads * plan.each;
}

void run_float(const FloatLinear& p, char* scratch, const Team& team) {
  const FloatPlan plan = plan_float(p, team);
  if (plan.panels == 0) return;
  const bool gated = p.linear.activation == kSwiglu;
  const int64_t gap = pieces(out_columns(p.linear), kFloatPanel);  // panels of gates before those of the others
  team.share(plan.threads, plan.panels, [&](int64_t first, int64_t last, int thread) {
    float* sums = reinterpret_cast<float*>(scratch + thread * plan.each);
    float *others = sums + plan.rows * kFloatPanel, *expanded = sums + (gated ? 2 : 1) * plan.rows * kFloatPanel;
    for (int64_t panel = first; panel < last; ++panel)
      for (int64_t row = 0; row < p.linear.rows; row += plan.rows) {
        const int64_t rows = least(plan.rows, p.linear.rows - row);
        float_panel(p, panel, row, rows, expanded, sums);
        if (gated) float_panel(p, gap + panel, row, rows, expanded, others);
        finish_floats(p, panel, row, rows, sums, others);
      }
  });
}

}  // namespace
}  // namespace cvmk::gemm
