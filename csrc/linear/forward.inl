// y = dropout(activation(x W^T + b)). First the weight is rounded and packed by all threads, then each item is a block of rows and some groups of
// columns, whose sums are finished while they are in the first cache. What a row's result is does not depend on the rows beside it.
#pragma once
#include "linear/shape.inl"

namespace cvmk::linear {
namespace {

template <typename E>
struct ForwardPlan {
  typedef typename E::Element Element;
  Shape shape;
  int64_t depth, groups, span, items, each;  // span: groups of an item
  int threads;
  Element* packed;
  char* own;

  ForwardPlan(const Forward& p, const Team& team, Arena* arena) : shape(p.linear), depth(E::depth(p.linear.inputs)), groups(shape.each / kGroup) {
    const Linear& l = p.linear;
    const int64_t blocks = blocks_of(l);
    threads = threads_for(l, team);
    const int64_t spans = blocks >= 4 * threads ? 1 : pieces(4 * threads, most(1, blocks));
    span = most(1, pieces(groups, spans));
    items = blocks * pieces(groups, span);  // none without rows or columns
    each = up(kRowBlock * depth * static_cast<int64_t>(sizeof(Element)), 64) + shape.halves * kRowBlock * kGroup * 4;
    packed = arena->take<Element>(shape.padded * depth);
    own = arena->take<char>(threads * each);
  }
};

// Vectors of bias in the columns of a group, zeros where there is none.
struct Biases {
  float at[2][kGroup];
  Biases(const Linear& l, const Shape& s, int64_t first) {
    for (int64_t h = 0; h < s.halves; ++h)
      for (int64_t v = 0; v < kGroup; v += kLanes) {
        const int n = static_cast<int>(most(0, least(kLanes, s.columns - first - v)));
        simd::store(at[h] + v, l.bias == nullptr || n == 0 ? F{} : elements::load_n(l.bias, l.bias_dtype, h * s.columns + first + v, n));
      }
  }
};

// Sums of a block's rows in a group of columns to results; `sums` has those of the second half behind the first's.
template <Activation kAct, Dtype kType>
struct Finish {
  const Forward& p;
  const Linear& l;
  const Shape& s;
  const Biases bias;
  const int64_t first, width;  // the group's first column and how many there are
  uint32_t hashes[kGroup];

  Finish(const Forward& forward, const Shape& shape, int64_t column) : p(forward), l(p.linear), s(shape), bias(l, s, column), first(column), width(least(kGroup, s.columns - column)) {
    if (l.dropout_limit != 0) column_hashes(l.dropout_key, first, kGroup, hashes);
  }

  CVMK_INLINE static void store(void* to, int64_t at, F x, int n) {
    void* const place = static_cast<char*>(to) + at * size_of(kType);
    if (n == kLanes) elements::store<kType>(place, x);
    else elements::store_n<kType>(place, x, n);
  }

  // n columns from v on of a row; returns the bits of a relu.
  CVMK_INLINE uint64_t vector(const float* sums, int64_t row, uint32_t hash, int64_t v, int n) const {
    F y = simd::load(sums + v) + simd::load(bias.at[0] + v);
    const uint64_t bits = kAct == kRelu ? bits_of(~(y <= 0.0f)) << v : 0;
    if (kAct >= kGelu && l.kept != nullptr) store(l.kept, row * l.outputs + first + v, y, n);
    if (kAct == kSwiglu) {
      const F up = simd::load(sums + kRowBlock * kGroup + v) + simd::load(bias.at[1] + v);
      if (l.kept != nullptr) store(l.kept, row * l.outputs + s.columns + first + v, up, n);
      y = activate<kSilu>(y) * up;
    } else {
      y = activate<kAct>(y);
    }
    if (l.dropout_limit != 0) y = simd::select(kept(hashes + v, hash, l.dropout_limit), y * l.keep_factor, F{});
    store(p.out, row * s.columns + first + v, y, n);
    return bits;
  }

  void rows(const float* sums, int64_t first_row, int64_t count) const {
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t row = first_row; row < first_row + count; ++row, sums += kGroup) {
      const uint32_t hash = l.dropout_limit != 0 ? row_hash(l.dropout_key, 0, row) : 0;
      uint64_t bits = 0;
      for (int64_t v = 0; v < whole; v += kLanes) bits |= vector(sums, row, hash, v, kLanes);
      if (whole < width) bits |= vector(sums, row, hash, whole, static_cast<int>(width - whole));
      if (kAct == kRelu && l.kept != nullptr) keep_bits(row, bits);
    }
  }

  CVMK_INLINE void keep_bits(int64_t row, uint64_t bits) const {
    if (width < kGroup) bits &= (uint64_t{1} << width) - 1;
    memcpy(static_cast<char*>(l.kept) + row * pieces(l.outputs, 8) + first / 8, &bits, static_cast<size_t>(pieces(width, 8)));
  }
};

template <Activation kAct>
void finish_as(const Forward& p, const Shape& s, const float* sums, int64_t row, int64_t rows, int64_t first) {
  elements::with_type(p.linear.dtype, [&](auto type) {
    if constexpr (decltype(type)::value != kFloat64) Finish<kAct, decltype(type)::value>(p, s, first).rows(sums, row, rows);
  });
}

inline void finish(const Forward& p, const Shape& s, const float* sums, int64_t row, int64_t rows, int64_t first) {
  switch (p.linear.activation) {
    case kRelu: return finish_as<kRelu>(p, s, sums, row, rows, first);
    case kGelu: return finish_as<kGelu>(p, s, sums, row, rows, first);
    case kSilu: return finish_as<kSilu>(p, s, sums, row, rows, first);
    case kSwiglu: return finish_as<kSwiglu>(p, s, sums, row, rows, first);
    default: return finish_as<kNone>(p, s, sums, row, rows, first);
  }
}

// A block's rows as a left operand: where they lie, or copied.
template <typename E>
struct LeftRows {
  const typename E::Element* data;
  int64_t stride;

  LeftRows(const Matrix& m, int64_t first, int64_t rows, int64_t width, int64_t depth, typename E::Element* own) : data(own), stride(depth) {
    if (E::reads_in_place(m, rows, width)) {
      data = static_cast<const typename E::Element*>(row(m, first));
      stride = m.stride;
      return;
    }
    for (int64_t r = 0; r < rows; ++r) E::copy_row(m, row(m, first + r), width, depth, own + r * depth);
  }
};

template <typename E>
void forward_item(const Forward& p, const ForwardPlan<E>& plan, int64_t item, char* memory) {
  typedef typename E::Element Element;
  const Linear& l = p.linear;
  const int64_t blocks = blocks_of(l), first = item % blocks * kRowBlock, rows = least(kRowBlock, l.rows - first), begin = item / blocks * plan.span;
  Element* own = reinterpret_cast<Element*>(memory);
  float* sums = reinterpret_cast<float*>(memory + plan.each - plan.shape.halves * kRowBlock * kGroup * 4);
  const LeftRows<E> left(l.x, first, rows, l.inputs, plan.depth, own);
  for (int64_t g = begin; g < least(begin + plan.span, plan.groups); ++g) {
    for (int64_t h = 0; h < plan.shape.halves; ++h)
      E::multiply_rows(rows, plan.depth, left.data, left.stride, plan.packed + (h * plan.shape.each + g * kGroup) * plan.depth, sums + h * kRowBlock * kGroup);
    finish(p, plan.shape, sums, first, rows, g * kGroup);
  }
}

template <typename E>
int64_t forward_scratch_with(const Forward& p, const Team& team) {
  Arena count;
  ForwardPlan<E>(p, team, &count);
  return count.used;
}

template <typename E>
void forward_with(const Forward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const ForwardPlan<E> plan(p, team, &arena);
  const Linear& l = p.linear;
  const auto pack = [&](int64_t i) {
    const void* rows[kAcross];
    for (int64_t r = 0; r < kAcross; ++r) rows[r] = row(l.weight, plan.shape.row_of(i * kAcross + r));
    E::turn(l.weight, rows, l.inputs, plan.packed, plan.depth, i * kAcross);
  };
  if (l.rows == 0) return;
  team.two_loops(plan.threads, plan.shape.padded / kAcross, pack, plan.items, [] { E::begin(); },
                 [&](int64_t i, int thread) { forward_item(p, plan, i, plan.own + thread * plan.each); }, [] { E::end(); });
}

}  // namespace
}  // namespace cvmk::linear
