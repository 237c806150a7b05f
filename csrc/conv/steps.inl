// Channels that lie side by side: lanes are channels, and a row is walked step by step, from its last real input to its first where the convolution
// is reversed. An item of the forward pass is a row's vector of channels; one of the backward pass a vector of channels in some neighbouring rows, whose
// sums over time it keeps, so that they are added up in an order that the sizes alone decide.
#pragma once
#include "conv/rows.inl"

namespace cvmk::conv {
namespace {

constexpr int64_t kMostParts = 64;   // of the batch, whose sums over time are kept apart
constexpr int64_t kSumsAtOnce = 64;  // steps whose products are added up before rounding is made good

// Where step i of a row's `real` ones stands.
CVMK_INLINE int64_t time_of(const Shape& s, int64_t real, int64_t i) { return s.reverse ? real - 1 - i : i; }

// The weights and, behind them, the biases of all channels as vectors: [vectors of channels][width + 1][kLanes], 0 for lanes without a channel.
CVMK_INLINE int64_t table_size(const Shape& s) { return pieces(s.dim, kLanes) * (s.width + 1) * kLanes; }
CVMK_INLINE void fill_table(const Shape& s, float* table) {
  clear(table, table_size(s));
  for (int64_t c = 0; c < s.dim; ++c) {
    float* const to = table + c / kLanes * (s.width + 1) * kLanes + c % kLanes;
    for (int64_t k = 0; k < s.width; ++k) to[k * kLanes] = s.weight[c * s.width + k];
    to[s.width * kLanes] = bias_of(s.bias, c);
  }
}

// Those of vector `at` of the channels.
struct Taps {
  F weight[kMaxWidth];
  F bias;
  CVMK_INLINE Taps(const Shape& s, const float* table, int64_t at) {
    const float* const from = table + at * (s.width + 1) * kLanes;
    for (int64_t k = 0; k < s.width; ++k) weight[k] = simd::load(from + k * kLanes);
    bias = simd::load(from + s.width * kLanes);
  }
  // As `filtered` of rows.inl, of the inputs from p on.
  template <int kWidth>
  CVMK_INLINE F operator()(const Shape& s, const F* p) const {
    const int64_t width = kWidth > 0 ? kWidth : s.width;
    F v = bias;
    for (int64_t k = 0; k < width; ++k) v += weight[k] * p[k];
    return v;
  }
};

// Input k of `count` rows' states [.., width - 1] from `row` on, 0 where there are none.
CVMK_INLINE F state_of(const void* states, Dtype type, int64_t row, int64_t front, int64_t k, int count) {
  if (states == nullptr) return F{};
  float numbers[kLanes] = {};
  for (int i = 0; i < count; ++i) numbers[i] = elements::load_one(states, type, (row + i) * front + k);
  return simd::load(numbers);
}
template <Dtype kType>
CVMK_INLINE void put_state(void* states, int64_t row, int64_t front, int64_t k, int count, F v) {
  constexpr size_t size = static_cast<size_t>(size_of(kType));
  char taken[kLanes * size];
  elements::store<kType>(taken, v);
  for (int i = 0; i < count; ++i) memcpy(elements::at(states, kType, (row + i) * front + k), taken + static_cast<size_t>(i) * size, size);
}

CVMK_INLINE int lanes_of(All) { return kLanes; }
CVMK_INLINE int lanes_of(First first) { return first.count; }

// body(c, All or First) for vector `at` of the channels.
template <typename Body>
CVMK_INLINE void with_channels(const Shape& s, int64_t at, const Body& body) {
  const int64_t c = at * kLanes;
  if (s.dim - c >= kLanes) body(c, All{});
  else body(c, First{static_cast<int>(s.dim - c)});
}

// Nothing, at the steps of row b that are not real.
template <typename Lanes>
CVMK_INLINE void put_padding(const Shape& s, const Elements& to, int64_t b, int64_t real, int64_t c, Lanes lanes) {
  for (int64_t t = real; t < s.length; ++t) put<kNoDtype>(to, (b * s.length + t) * s.dim + c, F{}, lanes);
}

// -- forward -----------------------------------------------------------------------------------------------------------------------
template <Dtype kX, int kWidth, typename Lanes>
CVMK_INLINE void forward_channels(const Forward& p, const float* table, int64_t b, int64_t c, Lanes lanes) {
  const Shape& s = p.shape;
  const int64_t real = real_inputs(s, b), width = kWidth > 0 ? kWidth : s.width, front = width - 1, row = b * s.dim + c;
  const int count = lanes_of(lanes);
  const Taps taps(s, table, c / kLanes);
  F window[kMaxWidth];
  for (int64_t k = 0; k < front; ++k) window[k] = state_of(s.before, kFloat32, row, front, k, count);
  for (int64_t i = 0; i < real; ++i) {
    const int64_t t = time_of(s, real, i);
    window[front] = get<kX>(p.x, b * s.x_batch + t * s.x_step + c, lanes);
    F y = taps.template operator()<kWidth>(s, window);
    if (s.silu) y = activations::silu(y);
    put<kX>(p.out, (b * s.length + t) * s.dim + c, y, lanes);
    for (int64_t k = 0; k < front; ++k) window[k] = window[k + 1];
  }
  put_padding(s, p.out, b, real, c, lanes);
  for (int64_t k = 0; k < front; ++k) {
    if constexpr (kX == kNoDtype) put_state<kFloat16>(p.last.data, row, front, k, count, window[k]);
    else put_state<kX>(p.last.data, row, front, k, count, window[k]);
  }
}

template <Dtype kX, int kWidth>
inline __attribute__((noinline)) void forward_vector(const Forward& p, const float* table, int64_t b, int64_t at) {
  with_channels(p.shape, at, [&](int64_t c, auto lanes) { forward_channels<kX, kWidth>(p, table, b, c, lanes); });
}

inline int64_t forward_steps_scratch(const Forward& p) {
  Arena count;
  count.take<float>(table_size(p.shape));
  return count.used;
}

inline void run_forward_steps(const Forward& p, char* scratch, const Team& team) {
  const Shape& s = p.shape;
  Arena arena{scratch};
  float* const table = arena.take<float>(table_size(s));
  fill_table(s, table);
  const int64_t vectors = pieces(s.dim, kLanes), items = s.batch * vectors;
  const bool usual = s.width == 4;
  const auto each = p.x.dtype == kFloat32    ? (usual ? forward_vector<kFloat32, 4> : forward_vector<kFloat32, 0>)
                    : p.x.dtype == kBFloat16 ? (usual ? forward_vector<kBFloat16, 4> : forward_vector<kBFloat16, 0>)
                                             : forward_vector<kNoDtype, 0>;  // float16
  team.share(threads_for(items, s.batch * s.dim * s.length, team), items, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) each(p, table, i / vectors, i % vectors);
  });
}

// -- backward ----------------------------------------------------------------------------------------------------------------------
// Sums of many rows' sums, a lane each (see `Total`).
struct Totals {
  F whole{}, lost{};
  CVMK_INLINE void add(F part) {
    const F more = part - lost, sum = whole + more;
    lost = sum - sum == 0.0f ? (sum - whole) - more : F{};
    whole = sum;
  }
};

struct BackwardSteps {
  int64_t vectors, rows_of_part, parts, items, threads, buffer;
  float* sums;     // [parts][vectors][width + 1][kLanes]: of the weights and of the bias
  float* table;
  float* buffers;  // of a thread: p and d, vectors with width - 1 of them before the first step and behind the last
  CVMK_INLINE BackwardSteps(const Backward& p, const Team& team, Arena* a) {
    const Shape& s = p.shape;
    vectors = pieces(s.dim, kLanes);
    rows_of_part = most(1, pieces(s.batch, kMostParts));
    parts = pieces(s.batch, rows_of_part);
    items = parts * vectors;
    threads = threads_for(items, s.batch * s.dim * s.length, team);
    buffer = (s.length + 2 * s.width) * kLanes;
    sums = a->take<float>(items * (s.width + 1) * kLanes);
    table = a->take<float>(table_size(s));
    buffers = a->take<float>(threads * 2 * buffer);
  }
};

// Step i of p at inputs[width - 1 + i], and its d at d[width - 1 + i]; adds their products to the sums.
template <Dtype kX, int kWidth, typename Lanes>
CVMK_INLINE void steps_before_activation(const Backward& p, const Taps& taps, int64_t b, int64_t real, int64_t c, Lanes lanes, F* inputs, F* d, Totals* sums) {
  const Shape& s = p.shape;
  const int64_t width = kWidth > 0 ? kWidth : s.width, front = width - 1;
  for (int64_t k = 0; k < front; ++k) inputs[k] = state_of(s.before, kFloat32, b * s.dim + c, front, k, lanes_of(lanes));
  for (int64_t begin = 0; begin < real; begin += kSumsAtOnce) {
    F some[kMaxWidth + 1] = {};
    for (int64_t i = begin; i < least(real, begin + kSumsAtOnce); ++i) {
      const int64_t t = time_of(s, real, i);
      inputs[front + i] = get<kX>(p.x, b * s.x_batch + t * s.x_step + c, lanes);
      F g = p.grad_out.data == nullptr ? F{} : get<kX>(p.grad_out, b * p.grad_batch + t * p.grad_step + c, lanes);
      if (s.silu) {
        const F y = taps.template operator()<kWidth>(s, inputs + i), gate = activations::sigmoid(y);
        g *= gate * (1.0f + y * (1.0f - gate));
      }
      d[front + i] = g;
      for (int64_t k = 0; k < width; ++k) some[k] += g * inputs[i + k];
      some[width] += g;
    }
    for (int64_t k = 0; k <= width; ++k) sums[k].add(some[k]);
  }
}

// As `gradients_of_inputs`.
template <Dtype kX, int kWidth, typename Lanes>
CVMK_INLINE void steps_of_inputs(const Backward& p, const Taps& taps, int64_t b, int64_t real, int64_t c, Lanes lanes, const F* d) {
  const Shape& s = p.shape;
  const int64_t width = kWidth > 0 ? kWidth : s.width, front = width - 1, row = b * s.dim + c;
  const int count = lanes_of(lanes);
  for (int64_t j = p.dbefore != nullptr ? 0 : front; j < real + front; ++j) {
    F v{};
    if (j >= front && j < real) {
      for (int64_t k = 0; k < width; ++k) v += taps.weight[k] * d[front + j - k];
    } else {
      for (int64_t k = most(0, j - real + 1); k <= least(front, j); ++k) v += taps.weight[k] * d[front + j - k];
    }
    if (j >= real && p.grad_last.data != nullptr) v += state_of(p.grad_last.data, p.grad_last.dtype, row, front, j - real, count);
    if (j < front) put_state<kFloat32>(p.dbefore, row, front, j, count, v);
    else if (p.dx.data != nullptr) put<kX>(p.dx, (b * s.length + time_of(s, real, j - front)) * s.dim + c, v, lanes);
  }
  if (p.dx.data != nullptr) put_padding(s, p.dx, b, real, c, lanes);
}

template <Dtype kX, int kWidth>
inline __attribute__((noinline)) void backward_vector(const Backward& p, const BackwardSteps& plan, int64_t part, int64_t at, float* buffers) {
  const Shape& s = p.shape;
  Totals sums[kMaxWidth + 1];
  F *const inputs = reinterpret_cast<F*>(buffers), *const d = reinterpret_cast<F*>(buffers + plan.buffer);
  with_channels(s, at, [&](int64_t c, auto lanes) {
    const Taps taps(s, plan.table, at);
    for (int64_t b = part * plan.rows_of_part; b < least(s.batch, (part + 1) * plan.rows_of_part); ++b) {
      const int64_t real = real_inputs(s, b);
      steps_before_activation<kX, kWidth>(p, taps, b, real, c, lanes, inputs, d, sums);
      if (p.dx.data != nullptr || p.dbefore != nullptr) steps_of_inputs<kX, kWidth>(p, taps, b, real, c, lanes, d);
    }
  });
  float* const to = plan.sums + (part * plan.vectors + at) * (s.width + 1) * kLanes;
  for (int64_t k = 0; k <= s.width; ++k) simd::store(to + k * kLanes, sums[k].whole);
}

// The parts of the batch added up, one after the other, in double precision.
inline void add_up(const Backward& p, const BackwardSteps& plan) {
  const Shape& s = p.shape;
  for (int64_t at = 0; at < plan.vectors; ++at)
    for (int64_t k = 0; k <= s.width; ++k) {
      double totals[kLanes] = {};
      for (int64_t part = 0; part < plan.parts; ++part) {
        const float* const from = plan.sums + ((part * plan.vectors + at) * (s.width + 1) + k) * kLanes;
        for (int i = 0; i < kLanes; ++i) totals[i] += static_cast<double>(from[i]);
      }
      for (int64_t c = at * kLanes; c < least(s.dim, (at + 1) * kLanes); ++c) {
        const float total = static_cast<float>(totals[c - at * kLanes]);
        if (k < s.width && p.dweight != nullptr) p.dweight[c * s.width + k] = total;
        if (k == s.width && p.dbias != nullptr) p.dbias[c] = total;
      }
    }
}

inline void run_backward_steps(const Backward& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const BackwardSteps plan(p, team, &arena);
  fill_table(p.shape, plan.table);
  const bool usual = p.shape.width == 4;
  const auto each = p.x.dtype == kFloat32    ? (usual ? backward_vector<kFloat32, 4> : backward_vector<kFloat32, 0>)
                    : p.x.dtype == kBFloat16 ? (usual ? backward_vector<kBFloat16, 4> : backward_vector<kBFloat16, 0>)
                                             : backward_vector<kNoDtype, 0>;
  team.share(plan.threads, plan.items, [&](int64_t first, int64_t last, int thread) {
    for (int64_t i = first; i < last; ++i) each(p, plan, i / plan.vectors, i % plan.vectors, plan.buffers + thread * 2 * plan.buffer);
  });
  add_up(p, plan);
}

}  // namespace
}  // namespace cvmk::conv
