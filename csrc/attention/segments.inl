// Which rows see which keys. An item is one sequence and one key head; its rows are those of all query heads that read the key head,
// one head after the other. Every mask but the bias is an interval of keys for each row.
#pragma once
#include "attention/math.inl"

namespace cvmk::attention {
namespace {

// One batch item, or one packed sequence.
struct Segment {
  int64_t b;                   // batch item of the pointers (0 where packed)
  int64_t q0, rows, k0, keys;  // first row and key in their tensors, and how many
  int64_t visible;             // keys that may be read
  int64_t offset;              // position of row 0 among the keys
};

inline int64_t segments(const Params& p) { return p.sequences >= 0 ? p.sequences : p.batch; }

inline Segment segment(const Params& p, int64_t s) {
  if (p.sequences >= 0) {
    const int64_t q0 = most(0, least(at(p.cu_q, s), p.rows)), q1 = most(q0, least(at(p.cu_q, s + 1), p.rows));
    const int64_t k0 = most(0, least(at(p.cu_k, s), p.keys)), k1 = most(k0, least(at(p.cu_k, s + 1), p.keys));
    return Segment{0, q0, q1 - q0, k0, k1 - k0, k1 - k0, (k1 - k0) - (q1 - q0)};
  }
  const int64_t visible = p.key_lengths.data == nullptr ? p.keys : most(0, least(at(p.key_lengths, s), p.keys));
  const int64_t offset = p.query_start.data == nullptr ? p.keys - p.rows : most(-kFar, least(at(p.query_start, s), kFar));
  return Segment{s, 0, p.rows, 0, p.keys, visible, offset};
}

// The keys [lo, hi) that row i of a segment sees.
inline void visible_keys(const Params& p, const Segment& g, int64_t i, int64_t* lo, int64_t* hi) {
  const int64_t position = i + g.offset;
  *lo = p.window_left >= 0 ? most(0, least(position - p.window_left, g.visible)) : 0;
  *hi = p.window_right >= 0 ? most(*lo, least(position + p.window_right + 1, g.visible)) : most(*lo, g.visible);
}

// The keys that any row of a segment sees: the bounds rise from row to row.
inline void seen_keys(const Params& p, const Segment& g, int64_t* lo, int64_t* hi) {
  int64_t unused;
  *lo = *hi = 0;
  if (g.rows == 0) return;
  visible_keys(p, g, 0, lo, &unused);
  visible_keys(p, g, g.rows - 1, &unused, hi);
  *hi = most(*hi, *lo);
}

struct Row {
  int64_t head, i;     // query head, row of the segment
  int64_t lo, hi;      // the keys of the segment that it sees
  uint32_t hash;       // of dropout
};

// Rows first to first + count - 1 of an item.
inline void rows_at(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t count, Row* rows) {
  int64_t head = kv_head * (p.heads / p.kv_heads) + first / g.rows, i = first % g.rows;
  for (int64_t r = 0; r < count; ++r) {
    Row& row = rows[r];
    row.head = head;
    row.i = i;
    visible_keys(p, g, i, &row.lo, &row.hi);
    row.hash = p.dropout_limit != 0 ? row_hash(p.dropout_key, g.b * p.heads + head, g.q0 + i) : 0;
    if (++i == g.rows) {
      i = 0;
      ++head;
    }
  }
}

inline void column_hashes(const Params& p, int64_t first, int64_t n, uint32_t* hashes) {
  if (p.dropout_limit != 0) cvmk::column_hashes(p.dropout_key, first, n, hashes);
}

// Pointers to rows [first, first + count) of a matrix, null from `end` on.
inline void row_pointers(const Matrix& m, int64_t width, int64_t b, int64_t h, int64_t origin, int64_t first, int64_t end, int64_t count, const char** rows) {
  for (int64_t r = 0; r < count; ++r) rows[r] = first + r < end ? row_of(m, width, b, h, origin + first + r) : nullptr;
}

}  // namespace
}  // namespace cvmk::attention
