// How the columns of a linear layer lie in packed operands, and reads of its rows.
#pragma once
#include "common/dropout.h"
#include "linear/activations.inl"

namespace cvmk::linear {
namespace {

constexpr int64_t kRowBlock = 128;   // rows of an item
constexpr int64_t kGroup = 64;      // columns of a product's result that stand at one time
constexpr int64_t kAcross = 32;     // rows of a panel of a left operand that is read across
constexpr int64_t kGrain = 1 << 18; // multiplications that are worth a thread

CVMK_INLINE int64_t halves_of(const Linear& l) { return l.activation == kSwiglu ? 2 : 1; }

// Packed columns [half][columns, filled up with zeros to whole groups]: a gated pair's halves start on groups of their own.
struct Shape {
  int64_t halves, columns, each, padded, inputs;  // inputs: those of the layer in whole groups

  explicit Shape(const Linear& l) : halves(halves_of(l)), columns(l.outputs / halves), each(up(columns, kGroup)), padded(halves * each), inputs(up(l.inputs, kGroup)) {}
  // The weight's row behind a packed column, or -1.
  int64_t row_of(int64_t packed) const { return packed % each < columns ? packed / each * columns + packed % each : -1; }
};

CVMK_INLINE int64_t blocks_of(const Linear& l) { return pieces(l.rows, kRowBlock); }

CVMK_INLINE const void* row(const Matrix& m, int64_t r) { return r < 0 ? nullptr : elements::at(m.data, m.dtype, r * m.stride); }

// The first n numbers from i on, as floats, rounded where the matrix says so; zeros behind them and where there is no row.
CVMK_INLINE F load(const Matrix& m, const void* row, int64_t i, int64_t width) {
  if (row == nullptr || i >= width) return F{};
  const F x = elements::load_n(row, m.dtype, i, static_cast<int>(least(kLanes, width - i)));
  if (m.rounds_to == kFloat32 || m.rounds_to == m.dtype) return x;
  return m.rounds_to == kBFloat16 ? simd::from_bf16(elements::round_bf16(x)) : simd::from_half(simd::to_half(x));
}

inline int threads_for(const Linear& l, const Team& team) {
  return static_cast<int>(least(team.size, most(1, l.rows * l.inputs * l.outputs / kGrain)));
}

}  // namespace
}  // namespace cvmk::linear
