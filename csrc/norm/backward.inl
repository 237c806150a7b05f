// Training, backwards: a few rows at a time are read twice, the second time from the first cache; sums over rows are made of items of rows, whose number and
// order do not depend on threads.
#pragma once
#include "norm/elements.inl"

namespace cvmk::norm {
namespace {

constexpr int kRows = 4;                // at a time: their sums hide each other's latency, and go to memory together
constexpr int64_t kItemRows = 32;       // of an item at least
constexpr int64_t kMostItems = 128;
constexpr int64_t kSumRows = 64;        // are summed by themselves, so that many rows lose no digits
constexpr int64_t kReducedColumns = 256;  // of the sums of all items, by one thread

// With xh = (sum - mean) factor and g = grad_normed weight, the gradient of the sum is factor (g - mean(g) - xh mean(g xh)) + grad_sum.
struct RowGradient {
  Statistics s;
  float mean_g, mean_gx;
  uint32_t hash;
};

// grad * weight rounded, never fused with what follows: where g and its mean cancel, both passes hold the same number.
CVMK_INLINE F weighted(F grad, F weight) {
  F g = grad * weight;
  __asm__("" : "+x"(g));
  return g;
}

template <Dtype kSum, Dtype kNormed>
CVMK_INLINE RowGradient row_gradient(const ResidualBackward& p, const float* weight, int64_t r) {
  const Shape& s = p.shape;
  const int64_t at = r * s.n;
  const Statistics row = {p.stats[r], p.stats[s.rows + r]};
  F g_sum = {}, gx_sum = {};
  each_vector(s.n, [&](int64_t i, auto lanes) {
    const F g = weighted(get<kNormed>(p.grad_normed, at + i, lanes), simd::load(weight + i));
    g_sum += g;
    gx_sum += g * ((get<kSum>(p.sum, at + i, lanes) - row.mean) * row.factor);
  });
  const float count = static_cast<float>(s.n);
  const uint32_t hash = s.dropout_limit != 0 ? row_hash(s.dropout_key, 0, r) : 0;
  return {row, s.rms ? 0.0f : simd::sum_lanes(g_sum) / count, simd::sum_lanes(gx_sum) / count, hash};
}

// kCount rows from row r; what they add to the gradients of weight and bias goes to dweight and dbias [padded].
template <Dtype kSum, Dtype kBranch, Dtype kNormed, bool kDrop, int kCount>
CVMK_INLINE void gradient_of_rows(const ResidualBackward& p, const Columns& columns, int64_t r, float* dweight, float* dbias) {
  const Shape& s = p.shape;
  RowGradient rows[kCount];
  for (int k = 0; k < kCount; ++k) rows[k] = row_gradient<kSum, kNormed>(p, columns.weight, r + k);
  each_vector(s.n, [&](int64_t i, auto lanes) {
    const F weight = simd::load(columns.weight + i);
    F weight_sum = {}, bias_sum = {};
    for (int k = 0; k < kCount; ++k) {
      const RowGradient& row = rows[k];
      const int64_t at = (r + k) * s.n + i;
      const F grad = get<kNormed>(p.grad_normed, at, lanes), x = (get<kSum>(p.sum, at, lanes) - row.s.mean) * row.s.factor;
      weight_sum += grad * x;
      bias_sum += grad;
      F d = (weighted(grad, weight) - row.mean_g - x * row.mean_gx) * row.s.factor;
      if (p.grad_sum.data != nullptr) d += get<kSum>(p.grad_sum, at, lanes);
      if (p.dx.data != nullptr) put<kSum>(p.dx, at, d, lanes);
      if (p.dbranch.data == nullptr) continue;
      if (kDrop) d = simd::select(kept(columns.hashes + i, row.hash, s.dropout_limit), d * s.keep_factor, F{});
      put<kBranch>(p.dbranch, at, d, lanes);
    }
    simd::store(dweight + i, simd::load(dweight + i) + weight_sum);
    simd::store(dbias + i, simd::load(dbias + i) + bias_sum);
  });
}

CVMK_INLINE void zero(float* to, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes) simd::store(to + i, F{});
}
CVMK_INLINE void add(float* to, const float* from, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes) simd::store(to + i, simd::load(to + i) + simd::load(from + i));
}

// The rows of an item; their sums to `sums` [2, padded], `own` [2, padded] is the thread's.
template <Dtype kSum, Dtype kBranch, Dtype kNormed, bool kDrop>
inline void gradient_of_item_as(const ResidualBackward& p, const Columns& columns, int64_t padded, int64_t first, int64_t last, float* own, float* sums) {
  zero(sums, 2 * padded);
  for (int64_t begin = first; begin < last; begin += kSumRows) {
    const int64_t end = least(last, begin + kSumRows);
    zero(own, 2 * padded);
    int64_t r = begin;
    for (; r + kRows <= end; r += kRows) gradient_of_rows<kSum, kBranch, kNormed, kDrop, kRows>(p, columns, r, own, own + padded);
    for (; r < end; ++r) gradient_of_rows<kSum, kBranch, kNormed, kDrop, 1>(p, columns, r, own, own + padded);
    add(sums, own, 2 * padded);
  }
}
template <Dtype kSum, Dtype kBranch, Dtype kNormed>
inline void gradient_of_item(const ResidualBackward& p, const Columns& columns, int64_t padded, int64_t first, int64_t last, float* own, float* sums) {
  if (p.shape.dropout_limit == 0) return gradient_of_item_as<kSum, kBranch, kNormed, false>(p, columns, padded, first, last, own, sums);
  gradient_of_item_as<kSum, kBranch, kNormed, true>(p, columns, padded, first, last, own, sums);
}

typedef void (*GradientOfItem)(const ResidualBackward&, const Columns&, int64_t, int64_t, int64_t, float*, float*);

inline GradientOfItem gradient_of_item_for(const ResidualBackward& p) {
  const auto is = [&](Dtype sum, Dtype branch, Dtype normed) {
    const auto fits = [](const Elements& x, Dtype type) { return x.data == nullptr || x.dtype == type; };
    return fits(p.sum, sum) && fits(p.grad_sum, sum) && fits(p.dx, sum) && fits(p.dbranch, branch) && fits(p.grad_normed, normed);
  };
  if (is(kFloat32, kFloat32, kFloat32)) return gradient_of_item<kFloat32, kFloat32, kFloat32>;
  if (is(kFloat32, kBFloat16, kBFloat16)) return gradient_of_item<kFloat32, kBFloat16, kBFloat16>;
  if (is(kBFloat16, kBFloat16, kBFloat16)) return gradient_of_item<kBFloat16, kBFloat16, kBFloat16>;
  return gradient_of_item<kNoDtype, kNoDtype, kNoDtype>;
}

struct BackwardPlan {
  int64_t item_rows, items, threads;
  ColumnsPlan columns;
  float *own, *sums;  // [threads, 2, padded], [items, 2, padded]

  BackwardPlan(const ResidualBackward& p, const Team& team, Arena* a)
      : item_rows(up(most(kItemRows, pieces(p.shape.rows, kMostItems)), kRows)),
        items(most(1, pieces(p.shape.rows, item_rows))),
        threads(least(items, team.size)),
        columns(p.shape, false, a) {
    own = a->take<float>(threads * 2 * columns.padded);
    sums = a->take<float>(items * 2 * columns.padded);
  }
};

int64_t backward_scratch(const ResidualBackward& p, const Team& team) {
  Arena count;
  BackwardPlan(p, team, &count);
  return count.used;
}

// The columns [first, last) of the sums of all items, by pairs, into those of the first item.
CVMK_INLINE void add_items(const BackwardPlan& plan, int64_t first, int64_t last) {
  const int64_t size = 2 * plan.columns.padded;
  for (int64_t step = 1; step < plan.items; step *= 2)
    for (int64_t item = 0; item + step < plan.items; item += 2 * step)
      for (int64_t i = first; i < last; i += kLanes) {
        float* to = plan.sums + item * size + i;
        simd::store(to, simd::load(to) + simd::load(to + step * size));
      }
}

void run_backward(const ResidualBackward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const BackwardPlan plan(p, team, &arena);
  const Columns columns = plan.columns.fill(p.shape, Elements{});
  const GradientOfItem gradient = gradient_of_item_for(p);
  const int64_t padded = plan.columns.padded, size = 2 * padded, rows = p.shape.rows;
  const auto item = [&](int64_t i, int thread) {
    gradient(p, columns, padded, i * plan.item_rows, least(rows, (i + 1) * plan.item_rows), plan.own + thread * size, plan.sums + i * size);
  };
  const Team alone;
  (rows * p.shape.n < kFewElements ? alone : team).each(plan.items, item);
  const auto reduce = [&](int64_t i, int) { add_items(plan, i * kReducedColumns, least(size, (i + 1) * kReducedColumns)); };
  (plan.items * size < kFewElements * 4 ? alone : team).each(pieces(size, kReducedColumns), reduce);
  if (p.dweight.data != nullptr) elements::from_floats(p.dweight.data, p.dweight.dtype, plan.sums, 1.0f, p.shape.n);
  if (p.dbias.data != nullptr) elements::from_floats(p.dbias.data, p.dbias.dtype, plan.sums + padded, 1.0f, p.shape.n);
}

}  // namespace
}  // namespace cvmk::norm
