// What is known of rows whose keys are taken block by block: sums under a running maximum, and how two such states become one.
#pragma once
#include "attention/segments.inl"
#include "attention/single_query.inl"

namespace cvmk::attention {
namespace {

// The state of a block of rows: sum of weighted values, running maximum (of scores times log2(e)) and sum; and room for a logarithm each.
struct State {
  float *out, *top, *total, *logs;
  double *kl, *mass;  // of a distillation: sums of target * (log2 target - score), and of the target
};

// For `rows` rows of results of dvp numbers.
inline State take_state(Arena* arena, int64_t rows, int64_t dvp) {
  State s;
  s.out = arena->take<float>(rows * dvp);
  s.top = arena->take<float>(rows);
  s.total = arena->take<float>(rows);
  s.logs = arena->take<float>(rows);
  s.kl = arena->take<double>(rows);
  s.mass = arena->take<double>(rows);
  return s;
}

inline float power(float x) {
  float lanes[kLanes];
  simd::store(lanes, exp2<true>(simd::set(x)));
  return lanes[0];
}

// into += from, for one row. A part that saw nothing changes nothing.
inline void fold_row(const State& into, const State& from, int64_t r, int64_t dvp) {
  if (from.total[r] == 0.0f) return;
  into.kl[r] += from.kl[r];
  into.mass[r] += from.mass[r];
  float *a = into.out + r * dvp, *b = from.out + r * dvp;
  if (into.total[r] == 0.0f) {
    memcpy(a, b, static_cast<size_t>(dvp) * sizeof(float));
    into.top[r] = from.top[r];
    into.total[r] = from.total[r];
    return;
  }
  const float now = into.top[r] > from.top[r] ? into.top[r] : from.top[r];
  const float wa = power(into.top[r] - now), wb = power(from.top[r] - now);
  for (int64_t i = 0; i < dvp; i += kLanes) simd::store(a + i, simd::load(a + i) * wa + simd::load(b + i) * wb);
  into.total[r] = into.total[r] * wa + from.total[r] * wb;
  into.top[r] = now;
}

inline void clear(const State& s, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    s.top[r] = -kInf;
    s.total[r] = 0.0f;
    s.kl[r] = s.mass[r] = 0.0;
  }
}

// KL of a row from its sums. The target is normalised once more, so that the rounding of the teacher's log-sum-exp drops out; its mass is
// near 1, where log x = 2 (x - 1) / (x + 1) to the third order.
inline float divergence_of(double sum, double mass, double lse) {
  return static_cast<float>(sum * 0.6931471805599453 / mass - 2.0 * (mass - 1.0) / (mass + 1.0) + lse);
}

// out and lse of rows whose state is complete.
inline void write_rows(const Params& p, const Segment& g, const Row* rows, int64_t count, const State& state, int64_t dvp) {
  const int64_t width = size_of(p.dtype);
  for (int64_t r = 0; r < count; ++r) {
    if (r % kLanes == 0) simd::store(state.logs + r, simd::log(simd::load(state.total + r)));
    const float total = state.total[r], top = state.top[r];
    char* to = row_of_mutable(p.out, width, g.b, rows[r].head, g.q0 + rows[r].i);
    float* lse = reinterpret_cast<float*>(row_of_mutable(p.lse, 4, g.b, rows[r].head, g.q0 + rows[r].i));
    if (p.teacher.kl.data != nullptr) {
      float* kl = reinterpret_cast<float*>(row_of_mutable(p.teacher.kl, 4, g.b, rows[r].head, g.q0 + rows[r].i));
      *kl = total == 0.0f ? 0.0f : divergence_of(state.kl[r], state.mass[r], total < kInf ? static_cast<double>(top) * 0.6931471805599453 + state.logs[r] : total + top);
    }
    if (total == 0.0f) {
      memset(to, 0, static_cast<size_t>(p.dv * width));
      *lse = -kInf;
      continue;
    }
    if (is_single_query(p, g))
      from_direct_row(to, p.dtype, state.out + r * dvp, p.keep_factor / total, p.dv);
    else
      elements::from_floats(to, p.dtype, state.out + r * dvp, p.keep_factor / total, p.dv);
    *lse = total < kInf ? top * kLn2 + state.logs[r] : total + top;
  }
}

// Rows of packed tensors that belong to no sequence.
inline void write_outside(const Params& p) {
  if (p.sequences < 0) return;
  const Segment g{0, 0, p.rows, 0, 0, 0, 0};
  float zeros[4][kLanes] = {};
  double wide[2] = {};
  const State nothing{zeros[0], zeros[1], zeros[2], zeros[3], wide, wide + 1};
  const int64_t first = p.sequences == 0 ? p.rows : most(0, least(at(p.cu_q, 0), p.rows));
  const int64_t last = p.sequences == 0 ? p.rows : most(first, least(at(p.cu_q, p.sequences), p.rows));
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.rows; ++i)
      if (i < first || i >= last) {
        const Row row{h, i, 0, 0, 0};
        write_rows(p, g, &row, 1, nothing, 0);
      }
}

}  // namespace
}  // namespace cvmk::attention
