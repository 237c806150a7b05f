// int4_linear on AMX tiles for many rows: rows of x are the left operand, dequantised weights the right one.
//
// Two panels of the weight, 512 inputs at a time, are dequantised into the first cache and stay there while the rows of x stream by from the
// second one: loads that leave nothing behind (TILELOADDT1), for else x would push the weights out. Longer rows are copied part by part, for
// their lines would meet in the same sets of the caches, and their sums wait in the second cache for the next part.
#pragma once
#include "gemm/int4_tiles.inl"

#if CVMK_GEMM_TILES

namespace cvmk::gemm {
namespace {

constexpr int64_t kPartSteps = 16;                  // steps of a part
constexpr int64_t kPartBytes = kPartSteps * kTile;  // a part of a panel, or of 16 rows
constexpr int64_t kRoundRows = 512;                 // rows that pass again and again, and
constexpr int64_t kWaitingColumns = 512;            // columns whose sums wait between parts: both stand in the second cache

// -- weights -------------------------------------------------------------------------------------------------------------------------
// An item's panels, a part of their inputs, on their way to right operands [panels][kPartSteps][16 pairs of inputs][16 outputs][2], a tile at
// a time, so that the next item is dequantised while the one before it is multiplied.
struct Weights {
  const Int4Linear& p;
  char *natural, *to;  // a block as it comes out of the tables; the item
  Item item;
  int64_t step, steps, tile, all;

  Weights(const Int4Linear& linear, char* block) : p(linear), natural(block), to(nullptr), item(), step(0), steps(0), tile(0), all(0) {}

  void begin(const Item& which, int64_t first, int64_t count, char* where) {
    to = where;
    item = which;
    step = first;
    steps = count;
    tile = 0;
    all = item.count * steps;
  }

  void upto(int64_t end) {
    for (; tile < end; ++tile) {
      const int64_t panel = tile / steps, s = tile % steps, block = (step + s) / kBlockTiles;
      if (s % kBlockTiles == 0) dequantise_any(p, item.panels[panel], block, natural);
      __m512i a[kPanel];
#pragma GCC unroll 16
      for (int n = 0; n < kPanel; ++n) a[n] = _mm512_load_si512(natural + s % kBlockTiles * kTile + n * kStep);
      transpose16(a);
      char* at = to + panel * kPartBytes + s * kTile;
#pragma GCC unroll 16
      for (int n = 0; n < kPanel; ++n) _mm512_store_si512(at + n * kStep, a[n]);
    }
  }
};

// -- products ------------------------------------------------------------------------------------------------------------------------
// Up to 32 rows of x: `stride` bytes between rows of a tile, `step` between tiles of inputs, `next` between the two tiles of rows.
struct Left {
  const char* x;
  int64_t stride, step, next;
};

// One or two tiles of rows times one or two panels (kPartBytes apart), added to the sums unless `first`; `more` tiles of the next weights.
template <int kTiles, int kPanels>
inline void wide_product(const Left& a, const char* w, int64_t steps, char* sums, int64_t stride, bool first, Weights* next, int64_t more) {
  const int64_t done = next->tile;
  begin_sums<kTiles, kPanels>(sums, stride, first);
  const char* x = a.x;
  for (int64_t s = 0; s < steps; ++s, x += a.step, w += kTile) {
    _tile_stream_loadd(4, x, a.stride);
    _tile_loadd(6, w, kStep);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kPanels == 2) {
      _tile_loadd(7, w + kPartBytes, kStep);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTiles == 2) {
      _tile_stream_loadd(5, x + a.next, a.stride);
      if constexpr (kPanels == 2) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 5, 6);
      }
    }
    if (more) next->upto(least(next->all, done + (s + 1) * more / steps));
  }
  end_sums<kTiles, kPanels>(sums, stride);
}

// An item's panels, which stand from `w` on, times a band of up to 32 rows.
template <int kTiles>
inline void wide_item(const Left& a, const char* w, int count, int64_t steps, float* sums, bool first, Weights* next, int64_t more) {
  const int64_t stride = count * kPanel * 4;
  int i = 0;
  for (; i + 2 <= count; i += 2) wide_product<kTiles, 2>(a, w + i * kPartBytes, steps, reinterpret_cast<char*>(sums + i * kPanel), stride, first, next, more);
  if (i < count) wide_product<kTiles, 1>(a, w + i * kPartBytes, steps, reinterpret_cast<char*>(sums + i * kPanel), stride, first, next, more);
}

// -- rows ----------------------------------------------------------------------------------------------------------------------------
constexpr int64_t kOrderedInputs = 1 << 21;  // of rows that are brought into stored order at one time

// Up to 16 rows from `row` on in stored order, one behind the other; `turned` has room for 16 rows.
inline void ordered_rows(const Int4Linear& p, int64_t row, int64_t rows, char* turned, char* to) {
  const int64_t inputs = p.linear.inputs;
  turn_rows(p.linear, row, rows, turned);
  for (int64_t k = 0; k < inputs; k += kTileInputs) {
    alignas(64) char tile[kTile];
    reorder(p.order + k, kTileInputs, turned, tile);
    __m512i a[kPanel];
#pragma GCC unroll 16
    for (int i = 0; i < kPanel; ++i) a[i] = _mm512_load_si512(tile + i * kStep);
    transpose16(a);
#pragma GCC unroll 16
    for (int r = 0; r < kPanel; ++r) _mm512_storeu_si512(to + (r * inputs + k) * 2, a[r]);
  }
}

// A part of up to 32 rows as tiles [2][kPartSteps][16][64 bytes], zeros behind the last row.
inline void copy_part(const char* x, int64_t stride, int64_t rows, int64_t steps, char* to) {
  for (int64_t r = 0; r < kBand; ++r, x += stride) {
    char* row = to + r / kPanel * kPartBytes + r % kPanel * kStep;
    for (int64_t s = 0; s < steps; ++s) _mm512_store_si512(row + s * kTile, r < rows ? _mm512_loadu_si512(x + s * kStep) : _mm512_setzero_si512());
  }
}

// -- the output ----------------------------------------------------------------------------------------------------------------------
constexpr int64_t kPastCaches = 1 << 22;  // bytes of a result that no second cache holds: whole lines of it are not read before they are written

// Rows of 32 sums -> activation(sum + bias) in the output, a line at a time, with kPast past the caches. `bias` [32] or null.
template <int kAct, bool kPast>
inline void finish_lines(const float* sums, const float* bias, int64_t rows, __mmask32 some, uint16_t* out, int64_t out_stride) {
  const F zero = F{}, b0 = bias ? simd::load(bias) : zero, b1 = bias ? simd::load(bias + kLanes) : zero;
  for (int64_t r = 0; r < rows; ++r, sums += kBand, out += out_stride) {
    F u = simd::load(sums), v = simd::load(sums + kLanes);
    if (bias) {
      u += b0;
      v += b1;
    }
    const __m512i line = simd::bits<__m512i>(_mm512_cvtne2ps_pbh(simd::bits<__m512>(activate<kAct>(v)), simd::bits<__m512>(activate<kAct>(u))));
    if constexpr (kPast) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
    else _mm512_mask_storeu_epi16(out, some, line);
  }
}

template <int kAct>
inline void finish_lines(const float* sums, const float* bias, int64_t rows, __mmask32 some, uint16_t* out, int64_t out_stride, bool past) {
  if (past) finish_lines<kAct, true>(sums, bias, rows, some, out, out_stride);
  else finish_lines<kAct, false>(sums, bias, rows, some, out, out_stride);
}

// The biases of an item of two panels.
inline void load_line(const Linear& l, const Item& item, float* to) {
  for (int64_t v = 0; v < kBand; v += kLanes) {
    const int64_t left = l.outputs - item.column - v;
    simd::store(to + v, left > 0 ? elements::load_n(l.bias, l.bias_dtype, item.column + v, static_cast<int>(least(kLanes, left))) : F{});
  }
}

// Sums of an item -> the output; `bias` [32] or null is that of an item of two panels.
inline void finish_wide(const Linear& l, const Item& item, const float* sums, const float* bias, int64_t row, int64_t rows) {
  if (item.count != 2 || l.activation == kSwiglu) return finish(l, item, sums, item.count * kPanel, nullptr, row, rows);
  const int64_t width = least(kBand, l.outputs - item.column);
  const __mmask32 some = width == kBand ? 0xFFFFFFFFu : (1u << width) - 1u;
  uint16_t* out = static_cast<uint16_t*>(l.out) + row * l.outputs + item.column;
  const bool lines = width == kBand && l.outputs % kBand == 0 && reinterpret_cast<uintptr_t>(out) % kStep == 0;
  const bool past = lines && l.rows * l.outputs * 2 >= kPastCaches;
  switch (l.activation) {
    case kRelu: return finish_lines<kRelu>(sums, bias, rows, some, out, l.outputs, past);
    case kGelu: return finish_lines<kGelu>(sums, bias, rows, some, out, l.outputs, past);
    case kSilu: return finish_lines<kSilu>(sums, bias, rows, some, out, l.outputs, past);
    default: return finish_lines<kNone>(sums, bias, rows, some, out, l.outputs, past);
  }
}

// -- the whole -----------------------------------------------------------------------------------------------------------------------
// Units are rounds of rows times blocks of items of `width` panels, of which an item needs `most` at most. A thread holds `each` bytes.
struct WideDivision {
  bool waits, direct;  // sums wait between parts; rows are read where they stand
  int threads, width, most;
  int64_t round, items, blocks, weight_bytes, x_bytes, sums_bytes, each;
};

inline WideDivision divide_wide(const Linear& l, const Team& team) {
  WideDivision d;
  const bool gated = l.activation == kSwiglu;
  d.waits = l.inputs > kPartSteps * kTileInputs;
  d.direct = !d.waits && l.x_stride == l.inputs;
  d.width = gated ? 1 : 2;
  d.most = gated ? 3 : 2;
  const int64_t all = pieces(out_columns(l), d.width * kPanel), bands = pieces(l.rows, kBand), threads = team.size;
  int64_t rounds = pieces(l.rows, kRoundRows);
  const int64_t least_blocks = d.waits ? pieces(all, kWaitingColumns / (d.most * kPanel)) : 1;
  const int64_t shares = pieces(least_blocks * rounds, threads) * threads;  // units, a multiple of the threads where columns and rows allow it
  d.items = pieces(all, least(all, pieces(shares, rounds)));
  d.blocks = pieces(all, d.items);
  if (d.blocks * rounds < threads) rounds = least(bands, pieces(threads, d.blocks));
  d.round = pieces(bands, rounds) * kBand;
  d.threads = static_cast<int>(least(threads, pieces(l.rows, d.round) * d.blocks));
  d.weight_bytes = 2 * d.most * kPartBytes;
  d.x_bytes = (d.direct ? kBand : d.round) / kPanel * kPartBytes;
  d.sums_bytes = (d.waits ? d.items * d.round : kBand) * d.most * kPanel * 4;
  d.each = up(d.weight_bytes + kBlockBytes + d.x_bytes + d.sums_bytes, 4096) + 1024;
  return d;
}

struct WideHold {
  char *weights, *natural, *x;
  float* sums;
};

// Rows [row, row + rows) times `count` items from `column` on.
inline void wide_unit(const Int4Linear& p, const WideDivision& d, int64_t column, int64_t count, int64_t row, int64_t rows, const WideHold& hold) {
  const Linear& l = p.linear;
  const int64_t all = l.inputs / kTileInputs, x_stride = l.x_stride * 2, bands = up(rows, kBand) / kBand;
  const auto copied = [&](int64_t r) { return hold.x + (d.direct ? 0 : r / kPanel * kPartBytes); };
  for (int64_t step = 0; step < all; step += kPartSteps) {
    const int64_t steps = least(kPartSteps, all - step);
    const bool first = step == 0, last = step + steps == all;
    const char* x = static_cast<const char*>(l.x) + row * x_stride + step * kStep;
    for (int64_t r = d.direct ? rows / kBand * kBand : 0; r < rows; r += kBand) copy_part(x + r * x_stride, x_stride, least(kBand, rows - r), steps, copied(r));
    Weights next(p, hold.natural);
    next.begin(item_of(l, column, d.width), step, steps, hold.weights);
    for (int64_t i = 0; i < count; ++i) {
      next.upto(next.all);
      const Item item = next.item;
      const char* weights = next.to;
      const bool more = i + 1 < count;
      if (more) next.begin(item_of(l, column + (i + 1) * d.width * kPanel, d.width), step, steps, hold.weights + (i + 1) % 2 * d.most * kPartBytes);
      const int64_t tiles = more ? (next.all + bands - 1) / bands : 0;
      float bias[kBand];
      if (last && l.bias && item.count == 2) load_line(l, item, bias);
      for (int64_t r = 0; r < rows; r += kBand) {
        const int64_t n = least(kBand, rows - r);
        const bool there = d.direct && n == kBand;
        const Left a = there ? Left{x + r * x_stride, x_stride, kStep, kPanel * x_stride} : Left{copied(r), kStep, kTile, kPartBytes};
        float* sums = hold.sums + (d.waits ? (i * d.round + r) * d.most * kPanel : 0);
        if (n > kPanel) wide_item<2>(a, weights, item.count, steps, sums, first, &next, tiles);
        else wide_item<1>(a, weights, item.count, steps, sums, first, &next, tiles);
        if (last) finish_wide(l, item, sums, l.bias ? bias : nullptr, row + r, n);
      }
    }
  }
}

inline void wide(const Int4Linear& p, const WideDivision& d, char* scratch, const Team& team) {
  const Linear& l = p.linear;
  team.share(d.threads, pieces(l.rows, d.round) * d.blocks, [&](int64_t first, int64_t last, int thread) {
    Arena own{scratch + thread * d.each};
    WideHold hold;
    hold.weights = own.take<char>(d.weight_bytes);
    hold.natural = own.take<char>(kBlockBytes);
    hold.x = own.take<char>(d.x_bytes);
    hold.sums = own.take<float>(d.sums_bytes / 4);
    configure_columns(kPanel);
    for (int64_t u = first; u < last; ++u) {
      const int64_t row = u / d.blocks * d.round, column = u % d.blocks * d.items * d.width * kPanel;
      const int64_t count = least(d.items, up(out_columns(l) - column, d.width * kPanel) / (d.width * kPanel));
      wide_unit(p, d, column, count, row, least(d.round, l.rows - row), hold);
    }
    _mm_sfence();  // what went past the caches is there for whoever is told that the call is over
    _tile_release();
  });
}

// Where inputs stand in another order, so many rows at a time are copied to `ordered` bytes, through `turned` bytes a thread.
struct WidePlan {
  int64_t rows, ordered, turned;
  WideDivision division;
};

inline WidePlan plan_wide(const Int4Linear& p, const Team& team) {
  Linear l = p.linear;
  if (p.order) {
    l.x_stride = l.inputs;
    l.rows = least(l.rows, up(kOrderedInputs / l.inputs, kBand));
  }
  return {l.rows, p.order ? up(l.rows, kPanel) * l.inputs * 2 : 0, p.order ? kPanel * l.inputs * 2 : 0, divide_wide(l, team)};
}

inline int64_t wide_scratch(const Int4Linear& p, const Team& team) {
  const WidePlan plan = plan_wide(p, team);
  return plan.ordered + plan.division.threads * (plan.turned + plan.division.each);
}

inline void on_wide_tiles(const Int4Linear& p, char* scratch, const Team& team) {
  const WidePlan plan = plan_wide(p, team);
  const WideDivision& d = plan.division;
  if (!p.order) return wide(p, d, scratch, team);
  Int4Linear part = p;
  Linear& l = part.linear;
  l.x_stride = l.inputs;
  l.x = scratch;
  part.order = nullptr;
  for (int64_t row = 0; row < p.linear.rows; row += plan.rows) {
    const int64_t rows = least(plan.rows, p.linear.rows - row);
    team.share(d.threads, pieces(rows, kPanel), [&](int64_t first, int64_t last, int thread) {
      char* const turned = scratch + plan.ordered + thread * plan.turned;
      for (int64_t i = first; i < last; ++i)
        ordered_rows(p, row + i * kPanel, least(kPanel, rows - i * kPanel), turned, scratch + i * kPanel * l.inputs * 2);
    });
    l.rows = rows;
    l.out = static_cast<uint16_t*>(p.linear.out) + row * out_columns(l);
    wide(part, d, scratch + plan.ordered + d.threads * plan.turned, team);
  }
}

}  // namespace
}  // namespace cvmk::gemm

#endif
