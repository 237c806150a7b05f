// What coarse rows give to the gradients, after all other rows have given theirs: a pass over the rows, which finds their statistics and their
// dq, and one over chunks of keys, which adds to dk and dv. bias_grad.inl adds to the gradient of the bias.
#pragma once
#include "attention/coarse.inl"

namespace cvmk::attention {
namespace {

struct CoarseGradient {
  int64_t group, blocks, chunks, own_bytes;
  CoarseRow* known;  // of every row of lse
  char* own;         // a scratch a thread

  CoarseGradient(const Params& p, const Team& team, CoarseRow* statistics, Arena* arena)
      : group(p.heads / p.kv_heads), blocks(pieces(p.rows * group, kCoarseRows)), chunks(pieces(p.keys, kCoarseKeys)), known(statistics) {
    Arena one;
    CoarseScratch(&one, p);
    own_bytes = up(one.used, 4096);
    own = arena->take<char>(own_bytes * least(segments(p) * p.kv_heads * most(blocks, chunks), team.size));
  }

  static int64_t index_of(const Params& p, const Segment& g, const Row& row) { return (g.b * p.heads + row.head) * p.rows + g.q0 + row.i; }

  static void statistics_of(const Params& p, const Segment& g, const CoarseRow* known, const Row* rows, int64_t count, CoarseRow* found) {
    for (int64_t r = 0; r < count; ++r) found[r] = known[index_of(p, g, rows[r])];
  }

  void run(const Params& p, const Team& team) const {
    team.each(segments(p) * p.kv_heads * blocks, [&](int64_t unit, int thread) {
      Arena arena{own + own_bytes * thread};
      rows(p, segment(p, unit / blocks / p.kv_heads), unit / blocks % p.kv_heads, unit % blocks * kCoarseRows, CoarseScratch(&arena, p));
    });
    if (p.dk.data == nullptr && p.dv_.data == nullptr) return;
    team.each(segments(p) * p.kv_heads * chunks, [&](int64_t unit, int thread) {
      Arena arena{own + own_bytes * thread};
      keys(p, segment(p, unit / chunks / p.kv_heads), unit / chunks % p.kv_heads, unit % chunks * kCoarseKeys, CoarseScratch(&arena, p));
    });
  }

  // Statistics and dq = sum_j P_j (dP_j - D) slope_j k_j, as the two sums with and without dP, for D is known when all keys are done.
  void rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, const CoarseScratch& w) const {
    Row block[kCoarseRows];
    const int64_t end = g.rows * group, count = first < end ? coarse_rows(p, g, kv_head, first, least(first + kCoarseRows, end), true, block) : 0;
    if (count == 0) return;
    CoarseRow state[kCoarseRows];
    int64_t lo, hi;
    seen_by(block, count, &lo, &hi);
    w.load_rows(p, g, block, count);
    CoarseScratch::clear(w.sum, count * w.dp);
    CoarseScratch::clear(w.other, count * w.dp);
    for (int64_t r = 0; r < count; ++r) state[r] = CoarseRow{-__builtin_inf(), 0.0, 0.0};
    for (int64_t j = lo / kCoarseKeys * kCoarseKeys; j < hi; j += kCoarseKeys) {
      const int64_t n = least(kCoarseKeys, hi - j);
      uint32_t hashes[kCoarseKeys] = {};
      column_hashes(p, g.k0 + j, n, hashes);
      w.load_keys(p, g, kv_head, j, n);
      w.scores(p, g, block, count, j);
      w.products(p, block, count, j, hashes);
      for (int64_t r = 0; r < count; ++r) one_row(w, r, state + r);
      if (p.dq.data == nullptr) continue;
      wide_multiply(count, w.dp, n, w.ds, kCoarseKeys, 1, w.k, w.dp, w.sum, w.dp, true);
      wide_multiply(count, w.dp, n, w.s, kCoarseKeys, 1, w.k, w.dp, w.other, w.dp, true);
    }
    for (int64_t r = 0; r < count; ++r) finish(p, g, block[r], state[r], w, r);
  }

  // One row and chunk: exp(score - top) slope to s, that times dP to ds; the sums so far under the new top.
  static void one_row(const CoarseScratch& w, int64_t r, CoarseRow* state) {
    double *x = w.s + r * kCoarseKeys, *y = w.ds + r * kCoarseKeys;
    const double change = w.exponentials(r, state);
    CoarseScratch::scale_row(w.sum + r * w.dp, w.dp, change);
    CoarseScratch::scale_row(w.other + r * w.dp, w.dp, change);
    D moment{};
    for (int64_t i = 0; i < kCoarseKeys; i += kWideLanes) {
      const D prob = wide_load(x + i), slope = wide_load(w.slope + r * kCoarseKeys + i), weighted = prob * wide_load(y + i);
      moment += weighted;
      wide_store(x + i, prob * slope);
      wide_store(y + i, weighted * slope);
    }
    state->delta = state->delta * change + wide_sum(moment);
  }

  void finish(const Params& p, const Segment& g, const Row& row, const CoarseRow& state, const CoarseScratch& w, int64_t r) const {
    const double share = state.total == 0.0 ? 0.0 : 1.0 / state.total;
    const double grad_lse = p.grad_lse.data == nullptr ? 0.0 : *reinterpret_cast<const float*>(row_of(p.grad_lse, 4, g.b, row.head, g.q0 + row.i));
    const double delta = state.delta * share - grad_lse;
    known[index_of(p, g, row)] = CoarseRow{state.top, state.total, delta};
    if (p.dq.data == nullptr) return;
    const double *with = w.sum + r * w.dp, *without = w.other + r * w.dp;
    for (int64_t i = 0; i < p.d; ++i) w.line[i] = static_cast<float>((with[i] - delta * without[i]) * share * static_cast<double>(p.scale));
    elements::from_floats(row_of_mutable(p.dq, size_of(p.dtype), g.b, row.head, g.q0 + row.i), p.dtype, w.line, 1.0f, p.d);
  }

  // dk and dv of the chunk at key j.
  void keys(const Params& p, const Segment& g, int64_t kv_head, int64_t j, const CoarseScratch& w) const {
    const int64_t n = least(kCoarseKeys, g.visible - j), rows = g.rows * group;
    bool any = false;
    uint32_t hashes[kCoarseKeys] = {};
    for (int64_t first = 0; n > 0 && first < rows; first += kCoarseRows) {
      Row block[kCoarseRows];
      const int64_t count = coarse_rows(p, g, kv_head, first, least(first + kCoarseRows, rows), true, block);
      int64_t lo = 0, hi = 0;
      if (count > 0) seen_by(block, count, &lo, &hi);
      if (count == 0 || lo >= j + n || hi <= j) continue;
      if (!any) {
        column_hashes(p, g.k0 + j, n, hashes);
        w.load_keys(p, g, kv_head, j, n);
        CoarseScratch::clear(w.sum, n * w.dp);
        CoarseScratch::clear(w.other, n * w.dvp);
        any = true;
      }
      CoarseRow state[kCoarseRows];
      statistics_of(p, g, known, block, count, state);
      w.load_rows(p, g, block, count);
      w.gradients(p, g, block, state, count, j, hashes, true);
      if (p.dk.data != nullptr) wide_multiply(n, w.dp, count, w.ds, 1, kCoarseKeys, w.q, w.dp, w.sum, w.dp, true);
      if (p.dv_.data != nullptr && p.grad_out.data != nullptr) wide_multiply(n, w.dvp, count, w.s, 1, kCoarseKeys, w.g, w.dvp, w.other, w.dvp, true);
    }
    for (int64_t i = 0; any && i < n; ++i) {
      add(p.dk, p, g, kv_head, j + i, w.sum + i * w.dp, p.d, p.scale, w.line);
      add(p.dv_, p, g, kv_head, j + i, w.other + i * w.dvp, p.dv, p.keep_factor, w.line);
    }
  }

  // factor * sum to a row of a gradient.
  static void add(const Matrix& m, const Params& p, const Segment& g, int64_t kv_head, int64_t j, const double* sum, int64_t n, float factor, float* line) {
    if (m.data == nullptr) return;
    char* row = row_of_mutable(m, size_of(p.dtype), g.b, kv_head, g.k0 + j);
    elements::to_floats(line, row, p.dtype, n, n);
    for (int64_t i = 0; i < n; ++i) line[i] = static_cast<float>(line[i] + sum[i] * static_cast<double>(factor));
    elements::from_floats(row, p.dtype, line, 1.0f, n);
  }

  // One head's rows [first, last) to the gradient of the bias: added to sums [rows or 1][stride], which begin at row `first` and key 0 of the segment.
  static void add_bias(const Params& p, const Segment& g, int64_t head, int64_t first, int64_t last, const CoarseRow* known, const CoarseScratch& w,
                       float* sums, int64_t stride) {
    const int64_t kv_head = head / (p.heads / p.kv_heads), start = head % (p.heads / p.kv_heads) * g.rows;
    for (int64_t i = first; i < last; i += kCoarseRows) {
      Row block[kCoarseRows];
      const int64_t count = coarse_rows(p, g, kv_head, start + i, start + least(i + kCoarseRows, last), true, block);
      if (count == 0) continue;
      CoarseRow state[kCoarseRows];
      int64_t lo, hi;
      seen_by(block, count, &lo, &hi);
      statistics_of(p, g, known, block, count, state);
      w.load_rows(p, g, block, count);
      for (int64_t j = lo / kCoarseKeys * kCoarseKeys; j < hi; j += kCoarseKeys) {
        const int64_t n = least(kCoarseKeys, hi - j);
        uint32_t hashes[kCoarseKeys] = {};
        column_hashes(p, g.k0 + j, n, hashes);
        w.load_keys(p, g, kv_head, j, n);
        w.gradients(p, g, block, state, count, j, hashes, false);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t k = 0; k < n; ++k) {
            float* to = sums + (block[r].i - first) * stride + j + k;
            *to = static_cast<float>(*to + w.ds[r * kCoarseKeys + k]);
          }
      }
    }
  }
};

}  // namespace
}  // namespace cvmk::attention
