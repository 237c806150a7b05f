// The forward pass of coarse rows, after that of all.
#pragma once
#include "attention/coarse.inl"

namespace cvmk::attention {
namespace {

struct CoarseForward {
  int64_t blocks, units, own_bytes;
  char* own;  // a scratch a thread

  CoarseForward(const Params& p, const Team& team, Arena* arena)
      : blocks(pieces(p.rows * (p.heads / p.kv_heads), kCoarseRows)), units(segments(p) * p.kv_heads * blocks) {
    Arena one;
    CoarseScratch(&one, p);
    own_bytes = up(one.used, 4096);
    own = arena->take<char>(own_bytes * least(units, team.size));
  }

  void run(const Params& p, const Team& team) const {
    team.each(units, [&](int64_t unit, int thread) {
      const Segment g = segment(p, unit / blocks / p.kv_heads);
      const int64_t kv_head = unit / blocks % p.kv_heads, rows = g.rows * (p.heads / p.kv_heads), first = unit % blocks * kCoarseRows;
      Row found[kCoarseRows];
      const int64_t count = first < rows ? coarse_rows(p, g, kv_head, first, least(first + kCoarseRows, rows), false, found) : 0;
      if (count == 0) return;
      Arena arena{own + own_bytes * thread};
      attend(p, g, kv_head, found, count, CoarseScratch(&arena, p));
    });
  }

  static void attend(const Params& p, const Segment& g, int64_t kv_head, const Row* rows, int64_t count, const CoarseScratch& w) {
    CoarseRow state[kCoarseRows];
    int64_t lo, hi;
    seen_by(rows, count, &lo, &hi);
    w.load_rows(p, g, rows, count);
    CoarseScratch::clear(w.sum, count * w.dvp);
    for (int64_t r = 0; r < count; ++r) state[r] = CoarseRow{-__builtin_inf(), 0.0, 0.0};
    for (int64_t j = lo / kCoarseKeys * kCoarseKeys; j < hi; j += kCoarseKeys) {
      const int64_t n = least(kCoarseKeys, hi - j);
      uint32_t hashes[kCoarseKeys] = {};
      column_hashes(p, g.k0 + j, n, hashes);
      w.load_keys(p, g, kv_head, j, n);
      w.scores(p, g, rows, count, j);
      for (int64_t r = 0; r < count; ++r) {
        CoarseScratch::scale_row(w.sum + r * w.dvp, w.dvp, w.exponentials(r, state + r));
        CoarseScratch::drop(p, rows[r], hashes, w.s + r * kCoarseKeys);
      }
      wide_multiply(count, w.dvp, n, w.s, kCoarseKeys, 1, w.v, w.dvp, w.sum, w.dvp, true);
    }
    for (int64_t r = 0; r < count; ++r) write(p, g, rows[r], state[r], w.sum + r * w.dvp, w.line);
  }

  static void write(const Params& p, const Segment& g, const Row& row, const CoarseRow& state, const double* sum, float* line) {
    char* to = row_of_mutable(p.out, size_of(p.dtype), g.b, row.head, g.q0 + row.i);
    float* lse = reinterpret_cast<float*>(row_of_mutable(p.lse, 4, g.b, row.head, g.q0 + row.i));
    const double factor = state.total == 0.0 ? 0.0 : static_cast<double>(p.keep_factor) / state.total;
    for (int64_t i = 0; i < p.dv; ++i) line[i] = static_cast<float>(sum[i] * factor);
    elements::from_floats(to, p.dtype, line, 1.0f, p.dv);
    // The total is at least 1, where there is one. A finite number stays finite.
    const double x = state.total == 0.0 ? -__builtin_inf() : state.top + static_cast<double>(simd::log(simd::set(static_cast<float>(state.total)))[0]);
    constexpr double kLargest = 3.4028234663852886e38;
    *lse = static_cast<float>(x < -kLargest && x > -__builtin_inf() ? -kLargest : x > kLargest && x < __builtin_inf() ? kLargest : x);
  }
};

}  // namespace
}  // namespace cvmk::attention
