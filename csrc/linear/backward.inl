// The gradients of y = dropout(activation(x W^T + b)), with G the gradient of the pre-activation:
//
//   dx [row, k] = sum_n G[row, n] W[n, k]      items are blocks of rows; the weight is packed before
//   dW [n, k]   = sum_row G[row, n] x[row, k]  items are kAcross columns of G and a group of inputs
//   db [n]      = sum_row G[row, n]            a partial sum a block of rows, then the blocks in their order
//
// G is made a block of rows at a time, from what the forward pass kept and the generator of the dropout. Rows are taken in chunks whose operands stay in
// the second-level cache between their making and the products of dW, which are added up chunk by chunk. How large a chunk is changes no bit: it is a
// multiple of the parts whose sums are added one after the other.
#pragma once
#include "linear/forward.inl"

namespace cvmk::linear {
namespace {

constexpr int64_t kChunk = 512;  // rows of a chunk, or a multiple of it

template <typename E>
struct BackwardPlan {
  typedef typename E::Element Element;
  static_assert(kChunk % E::kPart == 0 && kChunk % kRowBlock == 0, "chunks are whole parts and blocks");
  Shape shape;
  bool rows_wanted, sums_wanted;  // dx; dW
  int threads;
  int64_t blocks, depth, chunk, room, items, each;  // depth: rows as dW sums them; room: such of a chunk; items: of dW
  Element *weight, *across, *x;                     // packed: W for dx, a chunk of G and of x for dW
  float *sums, *bias;                               // [items][kAcross][kGroup]; [blocks][shape.padded]
  uint32_t* hashes;                                 // of the dropout's columns
  int64_t* next;                                    // the items handed out of each phase: rows and sums of a chunk
  char* own;

  BackwardPlan(const Backward& p, const Team& team, Arena* arena)
      : shape(p.linear), rows_wanted(p.dx.data != nullptr), sums_wanted(p.d_weight.data != nullptr), threads(threads_for(p.linear, team)), blocks(blocks_of(p.linear)), depth(E::depth(p.linear.rows)) {
    chunk = sums_wanted ? up(2 * kRowBlock * threads, kChunk) : up(most(1, p.linear.rows), kChunk);
    room = least(chunk, depth);
    items = sums_wanted ? shape.padded / kAcross * (shape.inputs / kGroup) : 0;
    weight = arena->take<Element>(rows_wanted ? shape.padded * shape.inputs : 0);
    across = arena->take<Element>(sums_wanted ? shape.padded * room : 0);
    x = arena->take<Element>(sums_wanted ? shape.inputs * room : 0);
    sums = arena->take<float>(items * kAcross * kGroup);
    bias = arena->take<float>(p.d_bias.data != nullptr ? blocks * shape.padded : 0);
    hashes = arena->take<uint32_t>(p.linear.dropout_limit != 0 ? shape.each : 0);
    next = arena->take<int64_t>(2 * chunks());
    each = up(kRowBlock * shape.padded * static_cast<int64_t>(sizeof(Element)), 64) + kRowBlock * kGroup * 4;
    own = arena->take<char>(threads * each);
  }
  int64_t chunks() const { return pieces(blocks * kRowBlock, chunk); }
};

// A row of a result's gradient, and what was kept of it, in the type of the result.
template <Activation kAct, Dtype kType>
struct GradientRow {
  const Linear& l;
  const char *grad, *kept_row;
  const uint32_t* hashes;
  int64_t columns;
  uint32_t hash;

  CVMK_INLINE GradientRow(const Backward& p, const Shape& s, const uint32_t* column_hashes, int64_t row)
      : l(p.linear),
        grad(static_cast<const char*>(p.grad) + row * p.grad_stride * size_of(kType)),
        kept_row(static_cast<const char*>(l.kept) + (kAct == kRelu ? row * pieces(l.outputs, 8) : row * l.outputs * size_of(kType))),
        hashes(column_hashes),
        columns(s.columns),
        hash(l.dropout_limit != 0 ? row_hash(l.dropout_key, 0, row) : 0) {}

  CVMK_INLINE static F load(const char* from, int64_t v, int n) {
    const void* at = from + v * size_of(kType);
    return n == kLanes ? elements::load<kType>(at) : elements::load_n<kType>(at, n);
  }

  // put(column, G) for n > 0 columns from v on, those of the second half `each` further.
  template <typename Put>
  CVMK_INLINE void vector(int64_t v, int n, int64_t each, const Put& put) const {
    F g = load(grad, v, n);
    if (l.dropout_limit != 0) g = simd::select(kept(hashes + v, hash, l.dropout_limit), g * l.keep_factor, F{});
    if (kAct == kRelu) {
      const uint8_t* bits = reinterpret_cast<const uint8_t*>(kept_row) + v / 8;
      g = simd::select(mask_of(kLanes < 8 ? bits[0] >> v % 8 : kLanes == 8 || n <= 8 ? bits[0] : bits[0] | bits[1] << 8), g, F{});
    }
    if (kAct == kSwiglu) {
      const F gate = load(kept_row, v, n), up = load(kept_row, columns + v, n);
      put(v, derive<kSilu>(g * up, gate));
      put(each + v, g * activate<kSilu>(gate));
    } else {
      put(v, kAct >= kGelu ? derive<kAct>(g, load(kept_row, v, n)) : g);
    }
  }
};

// Rows of G as operands, filled up with zeros, and added to the bias's partial sums where they are wanted.
template <Activation kAct, Dtype kType, typename E>
void gradient_rows_as(const Backward& p, const BackwardPlan<E>& plan, int64_t first, int64_t rows, typename E::Element* to, float* bias) {
  const Shape& s = plan.shape;
  const int64_t whole = s.columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, to += s.padded) {
    const GradientRow<kAct, kType> row(p, s, plan.hashes, first + r);
    const auto put = [&](int64_t at, F x) __attribute__((always_inline)) {
      E::put(to + at, x);
      if (bias != nullptr) simd::store(bias + at, simd::load(bias + at) + x);
    };
    for (int64_t v = 0; v < whole; v += kLanes) row.vector(v, kLanes, s.each, put);
    int64_t v = whole;
    if (v < s.columns) {
      row.vector(v, static_cast<int>(s.columns - v), s.each, put);
      v += kLanes;
    }
    for (; v < s.each; v += kLanes)
      for (int64_t h = 0; h < s.halves; ++h) E::put(to + h * s.each + v, F{});
  }
}

template <Activation kAct, typename E>
void gradient_rows_of(const Backward& p, const BackwardPlan<E>& plan, int64_t first, int64_t rows, typename E::Element* to, float* bias) {
  elements::with_type(p.linear.dtype, [&](auto type) {
    if constexpr (decltype(type)::value != kFloat64) gradient_rows_as<kAct, decltype(type)::value, E>(p, plan, first, rows, to, bias);
  });
}

template <typename E>
void gradient_rows(const Backward& p, const BackwardPlan<E>& plan, int64_t first, int64_t rows, typename E::Element* to, float* bias) {
  switch (p.linear.activation) {
    case kRelu: return gradient_rows_of<kRelu, E>(p, plan, first, rows, to, bias);
    case kGelu: return gradient_rows_of<kGelu, E>(p, plan, first, rows, to, bias);
    case kSilu: return gradient_rows_of<kSilu, E>(p, plan, first, rows, to, bias);
    case kSwiglu: return gradient_rows_of<kSwiglu, E>(p, plan, first, rows, to, bias);
    default: return gradient_rows_of<kNone, E>(p, plan, first, rows, to, bias);
  }
}

// A block of rows of sums [rows][kGroup] to columns of a result.
inline void store_rows(const Written& to, const float* sums, int64_t rows, int64_t first_row, int64_t stride, int64_t column, int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    elements::from_floats(elements::at(static_cast<char*>(to.data), to.dtype, (first_row + r) * stride + column), to.dtype, sums + r * kGroup, 1.0f, width);
}

// G of a block of rows; dx of these; and both operands of dW.
template <typename E>
void backward_rows(const Backward& p, const BackwardPlan<E>& plan, int64_t block, char* memory) {
  typedef typename E::Element Element;
  const Linear& l = p.linear;
  const Shape& s = plan.shape;
  const int64_t first = block * kRowBlock, rows = least(kRowBlock, l.rows - first), at = first % plan.chunk;  // at: within the chunk
  Element* g = reinterpret_cast<Element*>(memory);
  float* sums = reinterpret_cast<float*>(memory + plan.each - kRowBlock * kGroup * 4);
  float* bias = p.d_bias.data == nullptr ? nullptr : plan.bias + block * s.padded;
  if (bias != nullptr) memset(bias, 0, static_cast<size_t>(s.padded) * sizeof(float));
  gradient_rows(p, plan, first, rows, g, bias);
  for (int64_t column = 0; plan.rows_wanted && column < l.inputs; column += kGroup) {
    E::multiply_rows(rows, s.padded, g, s.padded, plan.weight + column * s.padded, sums);
    store_rows(p.dx, sums, rows, first, l.inputs, column, least(kGroup, l.inputs - column));
  }
  if (!plan.sums_wanted) return;
  const int64_t padded = least(kRowBlock, plan.depth - first);
  for (int64_t r = 0; r < padded; r += 2) {
    const Element* left[2];
    const void* right[2];
    for (int64_t i = 0; i < 2; ++i) {
      left[i] = r + i < rows ? g + (r + i) * s.padded : nullptr;
      right[i] = r + i < rows ? row(l.x, first + r + i) : nullptr;
    }
    E::lay_left(left, s.padded, plan.across, plan.room, at + r);
    E::lay_right(l.x, right, l.inputs, s.inputs, plan.x, plan.room, at + r);
  }
  E::turn_left(plan.across, s.padded, plan.room, at, padded);
}

// What a chunk adds to dW of kAcross packed columns and a group of inputs; behind the last one, the result.
template <typename E>
void backward_sums(const Backward& p, const BackwardPlan<E>& plan, int64_t chunk, int64_t item) {
  const Linear& l = p.linear;
  const Shape& s = plan.shape;
  const int64_t groups = s.inputs / kGroup, packed = item / groups * kAcross, column = item % groups * kGroup, first = s.row_of(packed);
  if (first < 0) return;
  float* sums = plan.sums + item * kAcross * kGroup;
  const int64_t depth = least(plan.chunk, plan.depth - chunk * plan.chunk);
  E::multiply_across(depth, plan.room, plan.across + packed * plan.room, plan.x + column * plan.room, sums, chunk > 0);
  if (chunk == plan.chunks() - 1)
    store_rows(p.d_weight, sums, least(kAcross, s.columns - packed % s.each), first, l.inputs, column, least(kGroup, l.inputs - column));
}

template <typename E>
void backward_bias(const Backward& p, const BackwardPlan<E>& plan) {
  const Shape& s = plan.shape;
  for (int64_t h = 0; h < s.halves; ++h)
    for (int64_t v = 0; v < s.columns; v += kLanes) {
      const float* partial = plan.bias + h * s.each + v;
      F sum{};
      for (int64_t b = 0; b < plan.blocks; ++b) sum += simd::load(partial + b * s.padded);
      elements::store_n(p.d_bias.data, p.d_bias.dtype, h * s.columns + v, sum, static_cast<int>(least(kLanes, s.columns - v)));
    }
}

// Sums over no rows.
inline void clear(const Backward& p) {
  const Linear& l = p.linear;
  if (p.d_weight.data != nullptr) memset(p.d_weight.data, 0, static_cast<size_t>(l.outputs * l.inputs * size_of(p.d_weight.dtype)));
  if (p.d_bias.data != nullptr) memset(p.d_bias.data, 0, static_cast<size_t>(l.outputs * size_of(p.d_bias.dtype)));
}

template <typename E>
int64_t backward_scratch_with(const Backward& p, const Team& team) {
  Arena count;
  BackwardPlan<E>(p, team, &count);
  return count.used;
}

template <typename E>
void backward_with(const Backward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const BackwardPlan<E> plan(p, team, &arena);
  const Linear& l = p.linear;
  const Shape& s = plan.shape;
  if (l.rows == 0) return clear(p);
  if (l.dropout_limit != 0) column_hashes(l.dropout_key, 0, s.each, plan.hashes);
  const auto pack = [&](int64_t i) {
    const void* rows[2] = {row(l.weight, s.row_of(2 * i)), row(l.weight, s.row_of(2 * i + 1))};
    E::lay_right(l.weight, rows, l.inputs, s.inputs, plan.weight, s.padded, 2 * i);
  };
  const int64_t packs = plan.rows_wanted ? s.padded / 2 : 0, chunk_blocks = plan.chunk / kRowBlock;
  memset(plan.next, 0, static_cast<size_t>(2 * plan.chunks()) * sizeof(int64_t));
  team.together(plan.threads, [&](int thread, int threads) {
    for (int64_t i = packs * thread / threads; i < packs * (thread + 1) / threads; ++i) pack(i);
    const auto each = [&](int64_t phase, int64_t count, const auto& body) __attribute__((always_inline)) {
      team.wait(threads);
      const auto take = [&] { return __atomic_fetch_add(plan.next + phase, 1, __ATOMIC_RELAXED); };
      for (int64_t i = take(); i < count; i = take()) body(i);
    };
    E::begin();
    for (int64_t chunk = 0; chunk < plan.chunks(); ++chunk) {
      const int64_t first = chunk * chunk_blocks;
      each(2 * chunk, least(chunk_blocks, plan.blocks - first), [&](int64_t i) { backward_rows(p, plan, first + i, plan.own + thread * plan.each); });
      if (plan.sums_wanted) each(2 * chunk + 1, plan.items, [&](int64_t i) { backward_sums(p, plan, chunk, i); });
    }
    E::end();
  });
  if (p.d_bias.data != nullptr) backward_bias(p, plan);
}

}  // namespace
}  // namespace cvmk::linear
