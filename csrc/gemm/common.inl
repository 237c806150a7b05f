// What the quantised linear kernels share: elements of any dtype, the epilogue, and how work is split. Included in every level's file.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds it in its own intrinsics (its bug 105593)
#endif

#include "common/elements.h"
#include "gemm/params.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define CVMK_GEMM_TILES 1
#else
#define CVMK_GEMM_TILES 0
#endif

namespace cvmk::gemm {
namespace {

using simd::F;
using simd::I;
using simd::kLanes;

constexpr int kMostPanels = 9;             // of one item: 8, and one more for halves of a gated pair that start within a panel

// -- elements ----------------------------------------------------------------------------------------------------------------------
// Elements i ... i + kLanes - 1 as floats.
template <Dtype kType>
CVMK_INLINE F load_as(const void* p, int64_t i) {
  return elements::load<kType>(elements::at(p, kType, i));
}

// The first n of them, 0 <= n <= kLanes; the rest is 0 and not read.
template <Dtype kType>
CVMK_INLINE F load_some(const void* p, int64_t i, int n) {
  return n == kLanes ? load_as<kType>(p, i) : elements::load_n<kType>(elements::at(p, kType, i), n);
}

// -- activations -------------------------------------------------------------------------------------------------------------------
CVMK_INLINE F silu(F y) { return y / (1.0f + simd::exp(-y)); }

// y * Phi(y), Phi the normal distribution: its lower tail is exp(-t^2 / 2) P(w), w = 1 / (1 + t / 4), with a relative error of P of
// 2e-8 for t up to 14, where the tail is below the smallest float.
CVMK_INLINE F gelu(F y) {
  const F t = simd::abs(y);
  const F w = 1.0f / (1.0f + 0.25f * t);
  F p = simd::set(0.033946896459581606f);
  p = p * w - 0.1961782096582793f;
  p = p * w + 0.3950033856818909f;
  p = p * w - 0.33347168059206755f;
  p = p * w + 0.304488757208436f;
  p = p * w - 0.0203849914126591f;
  p = p * w + 0.12156823875862423f;
  p = p * w + 0.09482019174012975f;
  p = p * w + 0.10022900503057311f;
  p = p * w - 2.1600410307569676e-5f;
  const F tail = p * simd::exp(-0.5f * t * t);
  const F phi = y < 0.0f ? tail : 1.0f - tail;
  return y * phi;
}

template <int kAct>
CVMK_INLINE F activate(F y) {
  if (kAct == kRelu) return y < 0.0f ? F{} : y;  // NaN stays
  if (kAct == kGelu) return gelu(y);
  if (kAct == kSilu) return silu(y);
  return y;
}

// -- items of work -----------------------------------------------------------------------------------------------------------------
// Output columns [column, column + 16 * width) of a linear and the weight panels that they need. For a gated pair the gate's panels
// come first, then those that hold the up half: its columns start `shift` columns into them.
struct Item {
  int64_t column;
  int width, count, shift;
  int64_t panels[kMostPanels];
};

inline int64_t out_columns(const Linear& p) { return p.activation == kSwiglu ? p.outputs / 2 : p.outputs; }

inline Item item_of(const Linear& p, int64_t column, int width) {
  Item item;
  const int64_t columns = out_columns(p), panels = up(p.outputs, kPanel) / kPanel;
  item.column = column;
  item.width = static_cast<int>(least(width, up(columns - column, kPanel) / kPanel));
  item.count = item.width;
  item.shift = 0;
  for (int i = 0; i < item.width; ++i) item.panels[i] = column / kPanel + i;
  if (p.activation == kSwiglu) {
    const int64_t first = (columns + column) / kPanel;
    item.shift = static_cast<int>((columns + column) % kPanel);
    const int64_t more = least(item.width + (item.shift != 0), panels - first);
    for (int64_t i = 0; i < more; ++i) item.panels[item.count++] = first + i;
  }
  return item;
}

CVMK_INLINE F sums_of(const int32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, F);
}
CVMK_INLINE F sums_of(const float* p) { return simd::load(p); }

template <typename Sum>
CVMK_INLINE F scaled(const Sum* sum, float row, F column) {
  return sums_of(sum) * row * column;
}

// The lines of the output that rows [row, row + rows) of an item will fill, asked for while their sums are still being computed.
CVMK_INLINE void expect(const Linear& p, const Item& item, int64_t row, int64_t rows) {
  const int64_t bytes = size_of(p.out_dtype), columns = out_columns(p), width = least(item.width * kPanel, columns - item.column) * bytes;
  const char* out = static_cast<const char*>(p.out) + (row * columns + item.column) * bytes;
  for (int64_t r = 0; r < rows; ++r, out += columns * bytes)
    for (int64_t i = 0; i < width; i += 64) __builtin_prefetch(out + i, 1);
}

constexpr int kWholeItem = 4;

// Rows of kWholeItem vectors of sums whose columns' scales and biases stay in registers.
template <int kAct, bool kBias, typename Sum>
CVMK_INLINE void finish_whole(const float* scales, const float* bias, const Sum* sums, int64_t stride, const float* row_scales, int64_t rows, float* out, int64_t out_stride) {
  constexpr bool kInt8 = static_cast<Sum>(0.5f) == 0;
  F column[kWholeItem], added[kWholeItem];
#pragma GCC unroll 4
  for (int v = 0; v < kWholeItem; ++v) {
    column[v] = kInt8 ? simd::load(scales + v * kLanes) : F{};
    added[v] = kBias ? simd::load(bias + v * kLanes) : F{};
  }
  for (int64_t r = 0; r < rows; ++r, sums += stride, out += out_stride) {
    const float row_scale = kInt8 ? row_scales[r] : 1.0f;
#pragma GCC unroll 4
    for (int v = 0; v < kWholeItem; ++v) {
      F y = kInt8 ? sums_of(sums + v * kLanes) * row_scale * column[v] : sums_of(sums + v * kLanes);
      if (kBias) y += added[v];
      simd::store(out + v * kLanes, activate<kAct>(y));
    }
  }
}

// Rows of sums -> activation(scaled sum + bias) in the output. `sums` is [rows][stride], `row_scales` [rows] (int8 only).
// kOut: the output's type, kNoDtype where it is known at run time only.
template <int kAct, bool kBias, Dtype kOut, typename Sum>
CVMK_INLINE void finish_as(const Linear& p, const Item& item, const Sum* sums, int64_t stride, const float* row_scales, int64_t row, int64_t rows) {
  constexpr bool kInt8 = static_cast<Sum>(0.5f) == 0;
  constexpr int kHalves = kAct == kSwiglu ? 2 : 1;
  const int64_t columns = out_columns(p), width = least(item.width * kPanel, columns - item.column), up_at = item.width * kPanel + item.shift;
  float bias[2][kMostPanels * kPanel];
  if (kBias)
    for (int h = 0; h < kHalves; ++h)
      for (int64_t v = 0; v < width; v += kLanes)
        simd::store(bias[h] + v, elements::load_n(p.bias, p.bias_dtype, h * columns + item.column + v, static_cast<int>(least(kLanes, width - v))));
  if constexpr (kLanes == 16 && kAct != kSwiglu && kOut == kFloat32)
    if (width == kWholeItem * kLanes)
      return finish_whole<kAct, kBias>(p.scales + item.column, bias[0], sums, stride, row_scales, rows, static_cast<float*>(p.out) + row * columns + item.column, columns);
  for (int64_t r = 0; r < rows; ++r) {
    const float row_scale = kInt8 ? row_scales[r] : 1.0f;
    const Sum* s = sums + r * stride;
    const int64_t out = (row + r) * columns + item.column;
    for (int64_t v = 0; v < width; v += kLanes) {
      const float* scales = p.scales + item.column + v;
      F y = kInt8 ? scaled(s + v, row_scale, simd::load(scales)) : sums_of(s + v);
      if (kBias) y += simd::load(bias[0] + v);
      if (kAct == kSwiglu) {
        F u = kInt8 ? scaled(s + up_at + v, row_scale, simd::load(scales + columns)) : sums_of(s + up_at + v);
        if (kBias) u += simd::load(bias[1] + v);
        y = silu(y) * u;
      } else {
        y = activate<kAct>(y);
      }
      if (kOut == kFloat32 && width - v >= kLanes) simd::store(static_cast<float*>(p.out) + out + v, y);
      else elements::store_n(p.out, kOut == kNoDtype ? p.out_dtype : kOut, out + v, y, static_cast<int>(least(kLanes, width - v)));
    }
  }
}

template <int kAct, typename Sum>
CVMK_INLINE void finish_as(const Linear& p, const Item& item, const Sum* sums, int64_t stride, const float* row_scales, int64_t row, int64_t rows) {
  if (p.out_dtype == kBFloat16) {
    if (p.bias) finish_as<kAct, true, kBFloat16>(p, item, sums, stride, row_scales, row, rows);
    else finish_as<kAct, false, kBFloat16>(p, item, sums, stride, row_scales, row, rows);
  } else if (p.out_dtype == kFloat32) {
    if (p.bias) finish_as<kAct, true, kFloat32>(p, item, sums, stride, row_scales, row, rows);
    else finish_as<kAct, false, kFloat32>(p, item, sums, stride, row_scales, row, rows);
  } else {
    if (p.bias) finish_as<kAct, true, kNoDtype>(p, item, sums, stride, row_scales, row, rows);
    else finish_as<kAct, false, kNoDtype>(p, item, sums, stride, row_scales, row, rows);
  }
}

template <typename Sum>
inline __attribute__((noinline)) void finish(const Linear& p, const Item& item, const Sum* sums, int64_t stride, const float* row_scales, int64_t row, int64_t rows) {
  if (p.sink != nullptr) return p.sink->take(p.sink->context, {&p, row, rows, item.column, least(item.width * kPanel, p.outputs - item.column), sums, stride, row_scales});
  switch (p.activation) {
    case kRelu: return finish_as<kRelu>(p, item, sums, stride, row_scales, row, rows);
    case kGelu: return finish_as<kGelu>(p, item, sums, stride, row_scales, row, rows);
    case kSilu: return finish_as<kSilu>(p, item, sums, stride, row_scales, row, rows);
    case kSwiglu: return finish_as<kSwiglu>(p, item, sums, stride, row_scales, row, rows);
    default: return finish_as<kNone>(p, item, sums, stride, row_scales, row, rows);
  }
}

// -- threads -----------------------------------------------------------------------------------------------------------------------
// Rows of a round, a multiple of 32: `most` of them fit into the second cache. Every one of `apart` threads has rows of its own where there
// are enough of them.
inline int64_t rows_of_round(int64_t rows, int64_t most, int apart) {
  const int64_t fit = most < 32 ? 32 : most / 32 * 32;
  int64_t rounds = (rows + fit - 1) / fit;
  if (rounds < apart && rows >= 32 * apart) rounds = apart;
  return up((rows + rounds - 1) / rounds, 32);
}

}  // namespace
}  // namespace cvmk::gemm
