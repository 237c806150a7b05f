// The mean map of a group of teacher heads, a block at a time, from queries, keys and log-sum-exps.
#pragma once
#include "attention/softmax.inl"

namespace cvmk::attention {
namespace {

inline bool distills(const Params& p) { return p.teacher.heads > 0; }

// A head's group, and the teacher heads of a group.
inline int64_t group_of(const Params& p, int64_t head) { return head / (p.heads / p.teacher.groups); }
inline int64_t group_heads(const Params& p) { return p.teacher.groups > 0 ? p.teacher.heads / p.teacher.groups : 0; }

// Rows of the block that begins at row r of an item: with a teacher, of one head only.
inline int64_t block_rows(const Params& p, const Segment& g, int64_t r, int64_t last, int64_t limit) {
  const int64_t count = least(limit, last - r);
  return distills(p) ? least(count, g.rows - r % g.rows) : count;
}

template <class Products>
struct TeacherBlock {
  typedef typename Products::Element Element;
  Element *keys, *q;         // [heads of the group] packs
  float *scores, *target;    // [kRows][kKeys]
  float* lse;                // [heads of the group][kRows], times log2(e)
  int64_t rows, ld, pack_size, base;
  int64_t packed;            // the group whose keys are packed, or -1

  void take(Arena* arena, const Params& p, int64_t block_rows, int64_t block_keys, int64_t pack_keys) {
    const int64_t dp = Products::padded(p.teacher.d), heads = group_heads(p);
    rows = up(block_rows, 32);
    ld = block_keys;
    pack_size = heads > 0 ? Products::t_size(pack_keys, dp) : 0;
    packed = -1;
    keys = arena->take<Element>(heads * pack_size);
    q = arena->take<Element>(heads * rows * dp);
    lse = arena->take<float>(heads * rows);
    scores = arena->take<float>(heads > 0 ? rows * ld : 0);
    target = arena->take<float>(heads > 0 ? rows * ld : 0);
  }

  void load_keys(const Params& p, const Segment& g, int64_t head, int64_t from, int64_t to) {
    const int64_t group = group_of(p, head), width = size_of(p.dtype), dp = Products::padded(p.teacher.d);
    if (group == packed) return;
    packed = group;
    base = from;
    const char* pointers[Products::kGroup];
    for (int64_t t = 0; t < group_heads(p); ++t) {
      const int64_t kv_head = (group * group_heads(p) + t) / (p.teacher.heads / p.teacher.kv_heads);
      for (int64_t j = from; j < to; j += Products::kGroup) {
        row_pointers(p.teacher.k, width, g.b, kv_head, 0, j, to, Products::kGroup, pointers);
        Products::pack_t(keys + t * pack_size, j - from, pointers, p.dtype, p.teacher.d, dp);
      }
    }
  }

  // The rows, all of one student head.
  void load_rows(const Params& p, const Segment& g, const Row* block, int64_t count) {
    const int64_t width = size_of(p.dtype), dp = Products::padded(p.teacher.d), first = packed * group_heads(p);
    const char* pointers[256];
    for (int64_t t = 0; t < group_heads(p); ++t) {
      for (int64_t r = 0; r < count; ++r) {
        pointers[r] = row_of(p.teacher.q, width, g.b, first + t, block[r].i);
        const float x = *reinterpret_cast<const float*>(row_of(p.teacher.lse, 4, g.b, first + t, block[r].i));
        lse[t * rows + r] = x == -kInf ? 0.0f : x * kLog2E;
      }
      Products::pack_a(q + t * rows * dp, pointers, count, p.dtype, p.teacher.d, dp);
    }
  }

  // target[r - first][column] for rows [first, first + count) and the keys [j, j + n) that each sees; logs, where there is one teacher
  // head, becomes log2 of it in `scores`.
  void make_target(const Params& p, const Row* block, int64_t first, int64_t count, int64_t j, int64_t n) const {
    const int64_t dp = Products::padded(p.teacher.d), heads = group_heads(p);
    const F factor = simd::set(p.teacher.scale * kLog2E), share = simd::set(1.0f / static_cast<float>(heads));
    for (int64_t t = 0; t < heads; ++t) {
      Products::scores(q + t * rows * dp + first * dp, count, keys + t * pack_size, j - base, n, dp, scores, ld);
      for (int64_t r = 0; r < count; ++r) {
        const Row& row = block[first + r];
        const int64_t a = most(0, least(row.lo - j, n)), b = most(a, least(row.hi - j, n));
        const float shift = lse[t * rows + first + r];
        float *s = scores + r * ld, *to = target + r * ld;
        for (int64_t v = a / kLanes * kLanes; v < b; v += kLanes) {
          const F x = simd::load(s + v) * factor - shift;
          F y = exp2<true>(x) * share;
          if (v < a || v + kLanes > b) y = simd::select(inside(v, a, b), y, F{});
          simd::store(to + v, t == 0 ? y : simd::load(to + v) + y);
          simd::store(s + v, x);
        }
      }
    }
  }

  // Sums over one row of the block: target * (log2 target - s), in which s is `c` times the student's scores, and target.
  void divergence(const Params& p, int64_t r, int64_t a, int64_t b, const float* s, float c, double* sum, double* mass) const {
    const bool several = group_heads(p) > 1;
    F total{}, weight{};
    for (int64_t v = a / kLanes * kLanes; v < b; v += kLanes) {
      const F t = simd::load(target + r * ld + v);
      const F positive = simd::select(t > 0.0f, t, simd::set(1.0f));
      const F log = several ? simd::log(positive) * kLog2E : simd::load(scores + r * ld + v);
      const F term = t * (log - simd::load(s + v) * c);
      I seen = inside(v, a, b);
      total += simd::select(seen & (t != 0.0f), term, F{});
      weight += simd::select(seen, t, F{});
    }
    *sum += sum_lanes(total);
    *mass += sum_lanes(weight);
  }
};

}  // namespace
}  // namespace cvmk::attention
