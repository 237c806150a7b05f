// The matrix's gradient is written once: the rows of each id, which a counting sort has brought together in their order, are summed as floats.
#pragma once
#include "embed/forward.inl"

namespace cvmk::embed {
namespace {

constexpr int64_t kItemIds = 64;  // of the matrix, by one thread
constexpr int64_t kSumRows = 64;  // are summed by themselves, so that a frequent id loses no digits

struct BackwardPlan {
  int64_t padded, threads;
  int64_t* starts;    // [vocabulary + 1]: where an id's rows begin in `sorted`
  int32_t* sorted;    // [rows]
  uint32_t* columns;  // hashes of dropout
  float* sums;        // [threads, 3, padded]: of all rows of an id, of the last ones, and what rounding took

  BackwardPlan(const Backward& p, const Team& team, Arena* a)
      : padded(up(p.lookup.n, kLanes)), threads(most(1, least(pieces(p.lookup.vocabulary, kItemIds), team.size))) {
    starts = a->take<int64_t>(p.lookup.vocabulary + 1);
    sorted = a->take<int32_t>(p.lookup.rows);
    columns = p.lookup.dropout_limit != 0 ? a->take<uint32_t>(padded) : nullptr;
    sums = a->take<float>(threads * 3 * up(padded, 16));
  }
};

int64_t backward_scratch(const Backward& p, const Team& team) {
  Arena count;
  BackwardPlan(p, team, &count);
  return count.used;
}

inline void sort_by_id(const Lookup& l, int64_t* starts, int32_t* sorted) {
  for (int64_t id = 0; id <= l.vocabulary; ++id) starts[id] = 0;
  for (int64_t i = 0; i < l.rows; ++i) ++starts[integer_at(l.ids, l.ids_dtype, i)];
  int64_t before = 0;
  for (int64_t id = 0; id <= l.vocabulary; ++id) {
    const int64_t count = starts[id];
    starts[id] = before + count;  // the end, and after the loop below, which counts down, the beginning
    before += count;
  }
  for (int64_t i = l.rows - 1; i >= 0; --i) sorted[--starts[integer_at(l.ids, l.ids_dtype, i)]] = static_cast<int32_t>(i);
}

template <Dtype kType>
CVMK_INLINE void add_row(const Backward& p, const uint32_t* columns, int64_t row, float* sum) {
  const Lookup& l = p.lookup;
  const uint32_t hash = l.dropout_limit != 0 ? row_hash(l.dropout_key, 0, row) : 0;
  each_vector(l.n, [&](int64_t i, auto lanes) {
    F g = get<kType>(p.grad, row * l.n + i, lanes);
    if (l.dropout_limit != 0) g = simd::select(kept(columns + i, hash, l.dropout_limit), g, F{});
    simd::store(sum + i, simd::load(sum + i) + g);
  });
}

// whole += part, where `lost` keeps what rounding takes from one addition for the next (Kahan 1965).
CVMK_INLINE void add_compensated(float* whole, float* lost, const float* part, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F before = simd::load(whole + i), more = simd::load(part + i) - simd::load(lost + i), sum = before + more;
    simd::store(lost + i, simd::select(sum - sum == F{}, (sum - before) - more, F{}));
    simd::store(whole + i, sum);
  }
}

// The ids [first, last).
template <Dtype kType>
inline void gradient_of_ids(const Backward& p, const BackwardPlan& plan, int64_t first, int64_t last, float* whole) {
  const int64_t n = p.lookup.n;
  float *const part = whole + plan.padded, *const lost = part + plan.padded;
  const auto clear = [&](float* to) {
    for (int64_t i = 0; i < plan.padded; i += kLanes) simd::store(to + i, F{});
  };
  for (int64_t id = first; id < last; ++id) {
    char* to = elements::at(p.dweight.data, p.dweight.dtype, id * n);
    const int64_t end = plan.starts[id + 1];
    if (plan.starts[id] == end) {
      memset(to, 0, static_cast<size_t>(n * size_of(p.dweight.dtype)));
      continue;
    }
    clear(whole);
    clear(lost);
    for (int64_t begin = plan.starts[id]; begin < end; begin += kSumRows) {
      float* sum = end - plan.starts[id] <= kSumRows ? whole : part;
      if (sum == part) clear(part);
      for (int64_t k = begin; k < least(end, begin + kSumRows); ++k) add_row<kType>(p, plan.columns, plan.sorted[k], sum);
      if (sum == part) add_compensated(whole, lost, part, plan.padded);
    }
    elements::from_floats(to, p.dweight.dtype, whole, p.lookup.scale * p.lookup.keep_factor, n);
  }
}

void run_backward(const Backward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const BackwardPlan plan(p, team, &arena);
  const Lookup& l = p.lookup;
  sort_by_id(l, plan.starts, plan.sorted);
  if (l.dropout_limit != 0) column_hashes(l.dropout_key, 0, plan.padded, plan.columns);
  const auto item = [&](int64_t i, int thread) {
    float* own = plan.sums + thread * 3 * up(plan.padded, 16);
    const int64_t first = i * kItemIds, last = least(l.vocabulary, first + kItemIds);
    if (p.grad.dtype == kFloat32) return gradient_of_ids<kFloat32>(p, plan, first, last, own);
    if (p.grad.dtype == kBFloat16) return gradient_of_ids<kBFloat16>(p, plan, first, last, own);
    gradient_of_ids<kNoDtype>(p, plan, first, last, own);
  };
  const Team alone;
  ((l.rows + l.vocabulary) * l.n < kFewElements ? alone : team).each(pieces(l.vocabulary, kItemIds), item);
}

}  // namespace
}  // namespace cvmk::embed
