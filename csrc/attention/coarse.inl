// Coarse rows: a bias moves their scores so far from 0 that float32 has no digits left for the scores themselves, or overflows in units of
// log2(e) (masks of -1e4, -1e9, the lowest finite number). They are known by their log-sum-exp. The forward pass writes them anew, the backward
// pass takes them for rows that see no key and adds what they give afterwards: in double, a block of rows against a chunk of keys, in an order
// that depends on the row and its keys alone.
#pragma once
#include "attention/softmax.inl"
#include "attention/wide.inl"

namespace cvmk::attention {
namespace {

constexpr float kCoarse = 256.0f;  // a score is rounded to 2e-5 there, and probabilities by as much
constexpr int64_t kCoarseRows = 32, kCoarseKeys = 64;

// Whether float32 is precise enough for scores of such a log-sum-exp; NaN is not.
CVMK_INLINE bool is_fine(float lse) { return lse > -kCoarse && lse < kCoarse; }

// Of a row that sees keys, by what the forward pass wrote: -inf is left where all scores are.
CVMK_INLINE bool is_coarse(const Params& p, float lse) { return p.bias.data != nullptr && !is_fine(lse) && lse != -kInf; }

inline float lse_of(const Params& p, const Segment& g, const Row& row) {
  return *reinterpret_cast<const float*>(row_of(p.lse, 4, g.b, row.head, g.q0 + row.i));
}

// Whether there may be coarse rows: a look at all log-sum-exps. Those of -inf count where `empty`.
inline bool any_coarse(const Params& p, bool empty) {
  if (p.bias.data == nullptr) return false;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h) {
      const float* lse = reinterpret_cast<const float*>(row_of(p.lse, 4, b, h, 0));
      I fine = simd::seti(-1);
      for (int64_t t = 0; t < p.rows; t += kLanes) {
        const F x = simd::load_n(lse + t, static_cast<int>(least(kLanes, p.rows - t)));
        fine &= ((x > -kCoarse) & (x < kCoarse)) | (empty ? I{} : x == -kInf);
      }
      for (int lane = 0; lane < kLanes; ++lane)
        if (fine[lane] == 0) return true;
    }
  return false;
}

// n numbers of the bias from column j of its row on.
inline void wide_bias(const Bias& bias, const char* row, int64_t j, int64_t n, double* to) {
  if (bias.stride[3] == 1) return to_wide(to, elements::at(row, bias.dtype, j), bias.dtype, n, n);
  for (int64_t i = 0; i < n; ++i) to_wide(to + i, elements::at(row, bias.dtype, (j + i) * bias.stride[3]), bias.dtype, 1, 1);
}

inline bool has_visible_bias(const Params& p, const Segment& g, const Row& row) {
  double x[kCoarseKeys];
  for (int64_t j = row.lo; j < row.hi; j += kCoarseKeys) {
    const int64_t n = least(kCoarseKeys, row.hi - j);
    wide_bias(p.bias, bias_row(p, g, row, j), 0, n, x);
    for (int64_t i = 0; i < n; ++i)
      if (!(x[i] == -__builtin_inf())) return true;
  }
  return false;
}

// The coarse ones of rows [first, last) of an item, kCoarseRows at most; how many. `written`: whether the forward pass has written them.
inline int64_t coarse_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t last, bool written, Row* found) {
  Row rows[kCoarseRows];
  int64_t count = 0;
  rows_at(p, g, kv_head, first, last - first, rows);
  for (int64_t r = 0; r < last - first; ++r) {
    if (rows[r].lo >= rows[r].hi) continue;
    const float lse = lse_of(p, g, rows[r]);
    if (is_coarse(p, lse) || (!written && lse == -kInf && has_visible_bias(p, g, rows[r]))) found[count++] = rows[r];
  }
  return count;
}

// What a row of the backward pass needs: the greatest score, the sum of exp(score - greatest), and <dO, O> less the gradient of the log-sum-exp.
struct CoarseRow {
  double top, total, delta;
};

// The work of a thread: a block of rows, a chunk of keys and what comes of both. Widths are padded with zeros to whole vectors.
struct CoarseScratch {
  int64_t dp, dvp;
  double *q, *g;                 // [kCoarseRows][dp], [dvp]
  double *k, *v, *k_t, *v_t;     // [kCoarseKeys][dp], [dvp]; transposed
  double *s, *ds, *slope;        // [kCoarseRows][kCoarseKeys]
  double *sum, *other;           // sums over keys of a block, or over rows of a chunk
  float* line;

  CoarseScratch(Arena* arena, const Params& p) : dp(up(p.d, kWideLanes)), dvp(up(p.dv, kWideLanes)) {
    const int64_t longest = most(kCoarseRows, kCoarseKeys), widest = most(dp, dvp);
    q = arena->take<double>(kCoarseRows * dp);
    g = arena->take<double>(kCoarseRows * dvp);
    k = arena->take<double>(kCoarseKeys * dp);
    v = arena->take<double>(kCoarseKeys * dvp);
    k_t = arena->take<double>(kCoarseKeys * dp);
    v_t = arena->take<double>(kCoarseKeys * dvp);
    s = arena->take<double>(kCoarseRows * kCoarseKeys);
    ds = arena->take<double>(kCoarseRows * kCoarseKeys);
    slope = arena->take<double>(kCoarseRows * kCoarseKeys);
    sum = arena->take<double>(longest * widest);
    other = arena->take<double>(longest * widest);
    line = arena->take<float>(up(widest, kLanes));
  }

  void load_rows(const Params& p, const Segment& seg, const Row* rows, int64_t count) const {
    const int64_t width = size_of(p.dtype);
    for (int64_t r = 0; r < count; ++r) {
      to_wide(q + r * dp, row_of(p.q, width, seg.b, rows[r].head, seg.q0 + rows[r].i), p.dtype, p.d, dp);
      if (p.grad_out.data != nullptr) to_wide(g + r * dvp, row_of(p.grad_out, width, seg.b, rows[r].head, seg.q0 + rows[r].i), p.dtype, p.dv, dvp);
    }
  }

  // Keys [j, j + n).
  void load_keys(const Params& p, const Segment& seg, int64_t kv_head, int64_t j, int64_t n) const {
    const int64_t width = size_of(p.dtype);
    for (int64_t i = 0; i < n; ++i) {
      to_wide(k + i * dp, row_of(p.k, width, seg.b, kv_head, seg.k0 + j + i), p.dtype, p.d, dp);
      to_wide(v + i * dvp, row_of(p.v, width, seg.b, kv_head, seg.k0 + j + i), p.dtype, p.dv, dvp);
    }
    transpose(k, n, dp, k_t);
    if (p.grad_out.data != nullptr) transpose(v, n, dvp, v_t);
  }

  static void transpose(const double* from, int64_t n, int64_t width, double* to) {
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j < kCoarseKeys; ++j) to[i * kCoarseKeys + j] = j < n ? from[j * width + i] : 0.0;
  }

  // Scores of the chunk to s, -inf where a row does not see a key, and the derivatives of the soft cap to slope.
  void scores(const Params& p, const Segment& seg, const Row* rows, int64_t count, int64_t j) const {
    wide_multiply(count, kCoarseKeys, dp, q, dp, 1, k_t, kCoarseKeys, s, kCoarseKeys, false);
    const double cap = p.softcap, scale = p.scale;
    for (int64_t r = 0; r < count; ++r) {
      double *x = s + r * kCoarseKeys, *y = slope + r * kCoarseKeys, bias[kCoarseKeys];
      for (int64_t i = 0; i < kCoarseKeys; i += kWideLanes) {
        const D score = wide_load(x + i);
        const D tanh = p.softcap > 0.0f ? wide_tanh(score * (scale / cap)) : D{};
        wide_store(y + i, 1.0 - tanh * tanh);
        wide_store(x + i, p.softcap > 0.0f ? tanh * cap : score * scale);
      }
      int64_t a, b;
      columns(rows[r], j, &a, &b);
      if (a < b) wide_bias(p.bias, bias_row(p, seg, rows[r], j + a), 0, b - a, bias);
      for (int64_t i = a; i < b; ++i) x[i] += bias[i - a];
      for (int64_t i = 0; i < kCoarseKeys; ++i)
        if (i < a || i >= b) x[i] = -__builtin_inf();
    }
  }

  // The columns [a, b) of the chunk at key j that a row sees.
  static void columns(const Row& row, int64_t j, int64_t* a, int64_t* b) {
    *a = most(0, least(row.lo - j, kCoarseKeys));
    *b = most(*a, least(row.hi - j, kCoarseKeys));
  }

  // Products of the gradients with the values to ds, as dropout left them; 0 where a row does not see a key.
  void products(const Params& p, const Row* rows, int64_t count, int64_t j, const uint32_t* hashes) const {
    if (p.grad_out.data == nullptr) {
      memset(ds, 0, static_cast<size_t>(count * kCoarseKeys) * sizeof(double));
      return;
    }
    wide_multiply(count, kCoarseKeys, dvp, g, dvp, 1, v_t, kCoarseKeys, ds, kCoarseKeys, false);
    for (int64_t r = 0; r < count; ++r) {
      int64_t a, b;
      columns(rows[r], j, &a, &b);
      double* x = ds + r * kCoarseKeys;
      for (int64_t i = 0; i < kCoarseKeys; ++i) x[i] = i < a || i >= b ? 0.0 : x[i] * static_cast<double>(p.keep_factor);
      drop(p, rows[r], hashes, x);
    }
  }

  static void drop(const Params& p, const Row& row, const uint32_t* hashes, double* x) {
    for (int64_t i = 0; p.dropout_limit != 0 && i < kCoarseKeys; ++i)
      if (mix(hashes[i] ^ row.hash) < p.dropout_limit) x[i] = 0.0;
  }

  // Row r of s: scores to exp(score - top), in which top and total are made those of the chunk as well; the factor for what is summed so far.
  double exponentials(int64_t r, CoarseRow* row) const {
    double* x = s + r * kCoarseKeys;
    D high = wide_set(row->top), added{};
    for (int64_t i = 0; i < kCoarseKeys; i += kWideLanes) high = wide_load(x + i) > high ? wide_load(x + i) : high;
    double top = row->top;
    for (int i = 0; i < kWideLanes; ++i) top = high[i] > top ? high[i] : top;
    const double base = shift(top), change = row->top == top ? 1.0 : wide_exp(row->top - base);
    for (int64_t i = 0; i < kCoarseKeys; i += kWideLanes) {
      const D y = wide_exp(wide_load(x + i) - base);
      wide_store(x + i, y);
      added += y;
    }
    row->total = row->total * change + wide_sum(added);
    row->top = top;
    return change;
  }

  // What is subtracted from the scores of a row: 0 where all are -inf.
  static double shift(double top) { return top == -__builtin_inf() ? 0.0 : top; }

  // From finished rows: probabilities after dropout, less 1 / (1 - p), to s, gradients of scores to ds; of the products, where `capped`.
  void gradients(const Params& p, const Segment& seg, const Row* rows, const CoarseRow* known, int64_t count, int64_t j, const uint32_t* hashes,
                 bool capped) const {
    scores(p, seg, rows, count, j);
    products(p, rows, count, j, hashes);
    for (int64_t r = 0; r < count; ++r) {
      double *x = s + r * kCoarseKeys, *y = ds + r * kCoarseKeys, *z = slope + r * kCoarseKeys;
      const double base = shift(known[r].top), share = known[r].total == 0.0 ? 0.0 : 1.0 / known[r].total;
      for (int64_t i = 0; i < kCoarseKeys; i += kWideLanes) {
        const D prob = wide_exp(wide_load(x + i) - base) * share;
        D grad = prob * (wide_load(y + i) - known[r].delta);
        if (capped) grad *= wide_load(z + i);
        wide_store(x + i, prob);
        wide_store(y + i, grad);
      }
      drop(p, rows[r], hashes, x);
      int64_t a, b;
      columns(rows[r], j, &a, &b);
      for (int64_t i = 0; i < kCoarseKeys; ++i)
        if (i < a || i >= b) x[i] = y[i] = 0.0;
    }
  }

  static void clear(double* to, int64_t count) { memset(to, 0, static_cast<size_t>(count) * sizeof(double)); }

  static void scale_row(double* row, int64_t width, double factor) {
    for (int64_t i = 0; factor != 1.0 && i < width; ++i) row[i] *= factor;
  }
};

// The keys that any of the rows sees.
inline void seen_by(const Row* rows, int64_t count, int64_t* lo, int64_t* hi) {
  *lo = rows[0].lo;
  *hi = rows[0].hi;
  for (int64_t r = 1; r < count; ++r) {
    *lo = least(*lo, rows[r].lo);
    *hi = most(*hi, rows[r].hi);
  }
}

}  // namespace
}  // namespace cvmk::attention
