// What both engines' backward passes share: the rows of a block, their statistics, and where gradients are gathered.
#pragma once
#include "attention/coarse.inl"
#include "attention/teacher.inl"

namespace cvmk::attention {
namespace {

// A block of rows: visible keys of the segment, lse times log2(e), <dO, O> less the gradient of lse. Rows that see no key count as zeros,
// since a NaN in them would reach dk and dv (q and g are null); coarse ones see none here, and are added by coarse_gradient.inl.
template <int kRows>
struct GradRows {
  int64_t count, lo, hi;
  Row rows[kRows];
  float lse[kRows], low[kRows], delta[kRows], weight[kRows];
  const char *q[kRows], *g[kRows];
};

inline float dot_rows(const char* x, const char* y, Dtype dtype, int64_t n) {
  F sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += elements::load(x, dtype, i) * elements::load(y, dtype, i);
  if (i < n) sum += elements::load_n(x, dtype, i, static_cast<int>(n - i)) * elements::load_n(y, dtype, i, static_cast<int>(n - i));
  return sum_lanes(sum);
}

template <int kRows>
void load_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t count, GradRows<kRows>* block) {
  const int64_t width = size_of(p.dtype);
  block->count = count;
  block->lo = g.visible;
  block->hi = 0;
  rows_at(p, g, kv_head, first, count, block->rows);
  for (int64_t r = 0; r < count; ++r) {
    Row& row = block->rows[r];
    const int64_t i = g.q0 + row.i;
    const float lse = lse_of(p, g, row);
    if (is_coarse(p, lse)) row.hi = row.lo;
    if (row.lo >= row.hi) {
      block->q[r] = block->g[r] = nullptr;
      block->lse[r] = block->low[r] = block->delta[r] = block->weight[r] = 0.0f;
      continue;
    }
    block->q[r] = row_of(p.q, width, g.b, row.head, i);
    block->g[r] = p.grad_out.data == nullptr ? nullptr : row_of(p.grad_out, width, g.b, row.head, i);
    const double wide = lse == -kInf ? 0.0 : lse * 1.4426950408889634;
    block->lse[r] = static_cast<float>(wide);
    block->low[r] = static_cast<float>(wide - block->lse[r]);
    float delta = block->g[r] == nullptr ? 0.0f : dot_rows(block->g[r], row_of(p.out, width, g.b, row.head, i), p.dtype, p.dv);
    if (p.grad_lse.data != nullptr) delta -= *reinterpret_cast<const float*>(row_of(p.grad_lse, 4, g.b, row.head, i));
    block->delta[r] = delta;
    block->weight[r] = p.teacher.grad_kl.data == nullptr ? 0.0f : *reinterpret_cast<const float*>(row_of(p.teacher.grad_kl, 4, g.b, row.head, i));
    block->lo = least(block->lo, row.lo);
    block->hi = most(block->hi, row.hi);
  }
}

// Row r's columns of the block that begins at key j and has n keys.
template <int kRows>
CVMK_INLINE GradRow grad_row(const GradRows<kRows>& block, int64_t r, int64_t j, int64_t n) {
  const Row& row = block.rows[r];
  const int64_t a = most(0, least(row.lo - j, n));
  return GradRow{a, most(a, least(row.hi - j, n)), block.lse[r], block.delta[r], block.low[r], row.hash, nullptr, block.weight[r]};
}

// The packs of an item's keys, beginning at key `base`: k and v transposed, k as it is.
template <typename Element>
struct KeyPacks {
  Element *k_t, *v_t, *k_b;
  int64_t base;
};

// Sums of a call to `block`: dq of the rows (null: not wanted), dk and dv of the whole range of keys that begins at key `base`.
struct GradSums {
  float *dq, *dk, *dv;
  int64_t base;
};

}  // namespace
}  // namespace cvmk::attention
