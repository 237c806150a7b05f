// Training, forwards: a row's sum goes to memory and, as floats, to a buffer in the first cache, from which statistics and result are made.
#pragma once
#include "norm/elements.inl"

namespace cvmk::norm {
namespace {

// The row's sum, as its type holds it, to `row` [padded].
template <Dtype kX, Dtype kBranch, bool kDrop>
CVMK_INLINE void add_row_as(const ResidualForward& p, const Columns& columns, int64_t at, uint32_t hash, float* row) {
  const Shape& s = p.shape;
  const auto add = [&](int64_t i, auto lanes) {
    F branch = get<kBranch>(p.branch, at + i, lanes);
    if (kDrop) branch = simd::select(kept(columns.hashes + i, hash, s.dropout_limit), branch * s.keep_factor, F{});
    const F sum = rounded<kX>(get<kX>(p.x, at + i, lanes) + branch, p.sum.dtype);
    put<kX>(p.sum, at + i, sum, lanes);
    simd::store(row + i, sum);
  };
  each_vector(s.n, add);
}
template <Dtype kX, Dtype kBranch>
inline void add_row(const ResidualForward& p, const Columns& columns, int64_t r, float* row) {
  const int64_t at = r * p.shape.n;
  if (p.shape.dropout_limit == 0) return add_row_as<kX, kBranch, false>(p, columns, at, 0, row);
  add_row_as<kX, kBranch, true>(p, columns, at, row_hash(p.shape.dropout_key, 0, r), row);
}

template <Dtype kNormed>
inline void norm_row(const ResidualForward& p, const Columns& columns, int64_t r, const float* row) {
  const int64_t at = r * p.shape.n;
  const Statistics s = statistics(row, p.shape.n, p.shape.rms, p.epsilon);
  if (p.stats != nullptr) {
    p.stats[r] = s.mean;
    p.stats[p.shape.rows + r] = s.factor;
  }
  each_vector(p.shape.n, [&](int64_t i, auto lanes) {
    F y = (simd::load(row + i) - s.mean) * s.factor * simd::load(columns.weight + i);
    if (columns.bias != nullptr) y += simd::load(columns.bias + i);
    put<kNormed>(p.normed, at + i, y, lanes);
  });
}

typedef void (*AddRow)(const ResidualForward&, const Columns&, int64_t, float*);
typedef void (*NormRow)(const ResidualForward&, const Columns&, int64_t, const float*);

// Null where there is no branch.
inline AddRow add_row_for(const ResidualForward& p) {
  if (p.branch.data == nullptr) return nullptr;
  if (p.x.dtype != p.sum.dtype) return add_row<kNoDtype, kNoDtype>;
  if (p.x.dtype == kFloat32 && p.branch.dtype == kFloat32) return add_row<kFloat32, kFloat32>;
  if (p.x.dtype == kFloat32 && p.branch.dtype == kBFloat16) return add_row<kFloat32, kBFloat16>;
  return p.x.dtype == kBFloat16 && p.branch.dtype == kBFloat16 ? add_row<kBFloat16, kBFloat16> : add_row<kNoDtype, kNoDtype>;
}
inline NormRow norm_row_for(const ResidualForward& p) {
  return p.normed.dtype == kFloat32 ? norm_row<kFloat32> : p.normed.dtype == kBFloat16 ? norm_row<kBFloat16> : norm_row<kNoDtype>;
}

struct ForwardPlan {
  int64_t threads;
  ColumnsPlan columns;
  float* rows;  // one of each thread

  ForwardPlan(const ResidualForward& p, const Team& team, Arena* a)
      : threads(p.shape.rows * p.shape.n < kFewElements ? 1 : most(1, least(p.shape.rows, team.size))), columns(p.shape, p.bias.data != nullptr, a) {
    rows = a->take<float>(threads * up(columns.padded, 16));
  }
};

int64_t forward_scratch(const ResidualForward& p, const Team& team) {
  Arena count;
  ForwardPlan(p, team, &count);
  return count.used;
}

void run_forward(const ResidualForward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const ForwardPlan plan(p, team, &arena);
  const Columns columns = plan.columns.fill(p.shape, p.bias);
  const AddRow add = add_row_for(p);
  const NormRow norm = norm_row_for(p);
  team.share(plan.threads, p.shape.rows, [&](int64_t first, int64_t last, int thread) {
    float* own = plan.rows + thread * up(plan.columns.padded, 16);
    for (int64_t r = first; r < last; ++r) {
      if (add != nullptr) add(p, columns, r, own);
      else elements::to_floats(own, elements::at(p.x.data, p.x.dtype, r * p.shape.n), p.x.dtype, p.shape.n, plan.columns.padded);
      norm(p, columns, r, own);
    }
  });
}

}  // namespace
}  // namespace cvmk::norm
