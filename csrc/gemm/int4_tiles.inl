// int4_linear on AMX tiles for up to 128 rows: weights rounded to bfloat16, as the reference does, are the left operand, rows of x the columns
// of the right one.
//
// So a row of a weight tile holds one output, whose sixteen values fit into one table; sums come out with rows of x along the vectors and
// are turned on their way to the output. Every thread turns the rows of x that it needs: nothing is waited for.
#pragma once
#include "gemm/int4_rows.inl"
#include "gemm/int4_weight.inl"

#if CVMK_GEMM_TILES

namespace cvmk::gemm {
namespace {

constexpr int64_t kBlockBytes = kBlockTiles * kTile;  // a block of a panel, dequantised
constexpr int64_t kFreshSlots = 2;                    // blocks that stand while one is multiplied and the next one dequantised
constexpr int64_t kPartBlocks = 4;                    // blocks that are multiplied at one time with more than one band of rows
constexpr int64_t kTurnedRows = 128;                  // rows up to which it costs less to turn rows than weights

// -- products ----------------------------------------------------------------------------------------------------------------------
// One step: `kPanels` tiles of weights (kBlockBytes apart) times one or two tiles of x (`x_next` bytes apart). With kStream x leaves nothing in
// the first cache, where it would push the weights out (TILELOADDT1).
template <int kPanels, int kTiles, bool kStream>
CVMK_INLINE void step_of(const char* w, const char* x, int64_t x_stride, int64_t x_next) {
  if constexpr (kStream) _tile_stream_loadd(4, x, x_stride);
  else _tile_loadd(4, x, x_stride);
  if constexpr (kTiles == 2) {
    _tile_loadd(6, w, kStep);
    _tile_dpbf16ps(0, 6, 4);
    if constexpr (kStream) _tile_stream_loadd(5, x + x_next, kStep);
    else _tile_loadd(5, x + x_next, kStep);
    _tile_dpbf16ps(1, 6, 5);
    if constexpr (kPanels > 1) {
      _tile_loadd(7, w + kBlockBytes, kStep);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  } else {
    _tile_loadd(5, w, kStep);
    _tile_dpbf16ps(0, 5, 4);
    if constexpr (kPanels > 1) {
      _tile_loadd(6, w + kBlockBytes, kStep);
      _tile_dpbf16ps(1, 6, 4);
    }
    if constexpr (kPanels > 2) {
      _tile_loadd(7, w + 2 * kBlockBytes, kStep);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, w + 3 * kBlockBytes, kStep);
      _tile_dpbf16ps(3, 5, 4);
    }
  }
}

// x of a product: a tile of 16 rows is `next` bytes long, `stride` bytes a pair of inputs; sums have rows of `sums_stride` bytes.
struct Columns {
  const char* x;
  int64_t stride, next, sums_stride;
};

// Panels of an item that are multiplied together, and where `slots` blocks of them stand dequantised: [slots][kPanels][kBlockTiles][1 KiB].
struct Group {
  const int64_t* panels;
  char* weights;
  int64_t slots;
};

// Adds the products of blocks [first, last) of a group of packed panels to sums [kPanels * 16 outputs][rows]. A block is dequantised while the
// one before it is multiplied.
template <int kPanels, int kTiles, bool kStream>
inline void fresh_product(const Int4Linear& p, const Group& group, const Columns& c, int64_t first, int64_t last, char* sums) {
  const int64_t steps = p.linear.inputs / kTileInputs, x_tile = kPanel * c.stride;
  const char *x = c.x + first * kBlockTiles * x_tile, *before = group.weights;
  begin_sums<kPanels, kTiles>(sums, c.sums_stride, first == 0);
  for (int64_t b = first; b <= last; ++b) {
    char* now = group.weights + (b - first) % group.slots * kPanels * kBlockBytes;
    const int64_t n = b == first ? 0 : least(kBlockTiles, steps - (b - 1) * kBlockTiles);
    for (int64_t i = 0; i < kBlockTiles; ++i) {
      if (b < last)
        for (int64_t q = i * kPanels / kBlockTiles; q < (i + 1) * kPanels / kBlockTiles; ++q) dequantise_any(p, group.panels[q], b, now + q * kBlockBytes);
      if (i < n) step_of<kPanels, kTiles, kStream>(before + i * kTile, x + i * x_tile, c.stride, c.next);
    }
    x += n * x_tile;
    before = now;
  }
  end_sums<kPanels, kTiles>(sums, c.sums_stride);
}

// The same for a group whose blocks stand already.
template <int kPanels, int kTiles>
inline void product(const Int4Linear& p, const Group& group, const Columns& c, int64_t first, int64_t last, char* sums) {
  const int64_t steps = least(last * kBlockTiles, p.linear.inputs / kTileInputs), x_tile = kPanel * c.stride;
  const char *x = c.x + first * kBlockTiles * x_tile, *w = group.weights;
  begin_sums<kPanels, kTiles>(sums, c.sums_stride, first == 0);
  for (int64_t s = first * kBlockTiles; s < steps; s += kBlockTiles, w += kPanels * kBlockBytes) {
    const int64_t n = least(kBlockTiles, steps - s);
    for (int64_t i = 0; i < n; ++i, x += x_tile) step_of<kPanels, kTiles, true>(w + i * kTile, x, c.stride, c.next);
  }
  end_sums<kPanels, kTiles>(sums, c.sums_stride);
}

// -- the output ----------------------------------------------------------------------------------------------------------------------
// Biases of an item's columns, and of its second half for a gated pair.
struct Biases {
  float at[2][kMostPanels * kPanel];
};

inline void gather_biases(const Linear& l, const Item& item, Biases* to) {
  const int64_t columns = out_columns(l), width = least(item.width * kPanel, columns - item.column);
  for (int h = 0; h < (l.activation == kSwiglu ? 2 : 1); ++h)
    for (int64_t v = 0; v < width; v += kLanes)
      simd::store(to->at[h] + v, elements::load_n(l.bias, l.bias_dtype, h * columns + item.column + v, static_cast<int>(least(kLanes, width - v))));
}

// Sums [outputs][stride] of up to 16 rows of x -> those rows of the output, 32 columns at a time.
template <int kAct, bool kBias>
inline void finish_turned(const Linear& l, const Item& item, const float* sums, int64_t stride, const Biases& biases, int64_t row, int64_t rows) {
  const int64_t columns = out_columns(l), width = least(item.width * kPanel, columns - item.column), up_at = item.width * kPanel + item.shift;
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto value = [&](int64_t n) {
    F y = simd::load(sums + n * stride);
    if (kBias) y += biases.at[0][n];
    if (kAct == kSwiglu) {
      F u = simd::load(sums + (up_at + n) * stride);
      if (kBias) u += biases.at[1][n];
      return silu(y) * u;
    }
    return activate<kAct>(y);
  };
  for (int64_t c = 0; c < width; c += kBand) {
    __m512i a[kPanel];
#pragma GCC unroll 16
    for (int i = 0; i < kPanel; ++i) {
      const F even = value(c + 2 * i), odd = value(c + 2 * i + 1);
      a[i] = _mm512_permutexvar_epi16(pairs, simd::bits<__m512i>(_mm512_cvtne2ps_pbh(simd::bits<__m512>(odd), simd::bits<__m512>(even))));
    }
    transpose16(a);
    const __mmask32 some = width - c >= kBand ? 0xFFFFFFFFu : (1u << (width - c)) - 1u;
    uint16_t* out = static_cast<uint16_t*>(l.out) + row * columns + item.column + c;
#pragma GCC unroll 16
    for (int r = 0; r < kPanel; ++r)
      if (r < rows) _mm512_mask_storeu_epi16(out + r * columns, some, a[r]);
  }
}

template <int kAct>
inline void finish_turned(const Linear& l, const Item& item, const float* sums, int64_t stride, const Biases& biases, int64_t row, int64_t rows) {
  if (l.bias) finish_turned<kAct, true>(l, item, sums, stride, biases, row, rows);
  else finish_turned<kAct, false>(l, item, sums, stride, biases, row, rows);
}

inline void finish_rows(const Linear& l, const Item& item, const float* sums, int64_t stride, const Biases& biases, int64_t row, int64_t rows) {
  switch (l.activation) {
    case kRelu: return finish_turned<kRelu>(l, item, sums, stride, biases, row, rows);
    case kGelu: return finish_turned<kGelu>(l, item, sums, stride, biases, row, rows);
    case kSilu: return finish_turned<kSilu>(l, item, sums, stride, biases, row, rows);
    case kSwiglu: return finish_turned<kSwiglu>(l, item, sums, stride, biases, row, rows);
    default: return finish_turned<kNone>(l, item, sums, stride, biases, row, rows);
  }
}

// -- items ---------------------------------------------------------------------------------------------------------------------------
// An item for up to 16 rows: four panels at a time.
inline void few_rows(const Int4Linear& p, const Item& item, const char* x, int64_t rows, float* sums, char* weights) {
  const Linear& l = p.linear;
  const int64_t stride = rows == 1 ? 1 : kPanel;
  const Columns c{x, stride * 4, 0, stride * 4};
  for (int i = 0; i < item.count;) {
    const int width = item.count - i >= 4 ? 4 : item.count - i >= 2 ? 2 : 1;
    const Group group{item.panels + i, weights, kFreshSlots};
    char* to = reinterpret_cast<char*>(sums + i * kPanel * stride);
    if (width == 4) fresh_product<4, 1, false>(p, group, c, 0, blocks_of(p), to);
    else if (width == 2) fresh_product<2, 1, false>(p, group, c, 0, blocks_of(p), to);
    else fresh_product<1, 1, false>(p, group, c, 0, blocks_of(p), to);
    i += width;
  }
  if (rows == 1) return finish(l, item, static_cast<const float*>(sums), item.count * kPanel, nullptr, 0, rows);
  Biases biases;
  if (l.bias) gather_biases(l, item, &biases);
  finish_rows(l, item, sums, stride, biases, 0, rows);
}

// One or two panels, blocks [first, last), times all bands of rows; the first band's products are made while the blocks are dequantised.
template <int kPanels>
inline void bands_of_group(const Int4Linear& p, const Group& group, const char* x, int64_t rows, int64_t first, int64_t last, float* sums, int64_t band_sums) {
  const int64_t next = p.linear.inputs * kPanel * 2;
  for (int64_t r = 0; r < rows; r += kBand, sums += band_sums) {
    const Columns c{x + r / kPanel * next, kStep, next, kBand * 4};
    char* to = reinterpret_cast<char*>(sums);
    if (rows <= kBand) fresh_product<kPanels, 2, false>(p, group, c, first, last, to);
    else if (r == 0) fresh_product<kPanels, 2, true>(p, group, c, first, last, to);
    else if (rows - r > kPanel) product<kPanels, 2>(p, group, c, first, last, to);
    else product<kPanels, 1>(p, group, c, first, last, to);
  }
}

// An item for more rows, in bands of 32, two panels at a time. One band takes all inputs at once; more take them in parts of kPartBlocks, which
// stay in the first cache from band to band.
inline void many_rows(const Int4Linear& p, const Item& item, const char* x, int64_t rows, float* sums, char* weights) {
  const Linear& l = p.linear;
  const int64_t blocks = blocks_of(p), band_sums = item.count * kPanel * kBand, part = rows > kBand ? kPartBlocks : blocks;
  expect(l, item, 0, rows);
  for (int g = 0; g < item.count; g += 2) {
    const Group group{item.panels + g, weights, rows > kBand ? kPartBlocks : kFreshSlots};
    for (int64_t b = 0; b < blocks; b += part) {
      const int64_t last = least(blocks, b + part);
      float* to = sums + g * kPanel * kBand;
      if (item.count - g > 1) bands_of_group<2>(p, group, x, rows, b, last, to, band_sums);
      else bands_of_group<1>(p, group, x, rows, b, last, to, band_sums);
    }
  }
  Biases biases;
  if (l.bias) gather_biases(l, item, &biases);
  for (int64_t r = 0; r < rows; r += kPanel)
    finish_rows(l, item, sums + r / kBand * band_sums + r % kBand, kBand, biases, r, least(kPanel, rows - r));
}

// -- the whole -----------------------------------------------------------------------------------------------------------------------
constexpr int64_t kAloneTiles = 1 << 17;  // below so many multiplications the calling thread does the work

// Up to kTurnedRows rows: threads share the columns, and every one turns the rows for itself. A thread holds `each` bytes.
struct TilePlan {
  int width;
  int64_t items, threads, x_bytes, natural_bytes, sums_bytes, weight_bytes, each;
};

inline TilePlan plan_tiles(const Int4Linear& p, const Team& team) {
  const Linear& l = p.linear;
  const int64_t columns = out_columns(l), rows = l.rows;
  const bool single = rows == 1, gated = l.activation == kSwiglu;
  const int limit = rows * l.inputs * l.outputs <= kAloneTiles ? 1 : team.size;
  TilePlan plan;
  int width = rows <= kPanel || l.inputs > 1024 ? 4 : 8;
  while (width > 2 && pieces(columns, width * kPanel) < 2 * limit) width /= 2;
  if (gated) width /= 2;
  const int most_panels = gated ? 2 * width + 1 : width;
  plan.width = width;
  plan.items = pieces(columns, width * kPanel);
  plan.threads = least(limit, plan.items);
  plan.x_bytes = up(rows, kBand) * l.inputs * 2;
  plan.natural_bytes = p.order && !single ? l.inputs * kPanel * 2 : 0;
  plan.sums_bytes = (most_panels + 2) * kPanel * up(rows, kBand) * 4;
  plan.weight_bytes = 2 * kPartBlocks * kBlockBytes;
  plan.each = up(plan.x_bytes + plan.natural_bytes + plan.sums_bytes + plan.weight_bytes, 4096) + 1024;
  return plan;
}

inline int64_t tiles_scratch(const Int4Linear& p, const Team& team) {
  const TilePlan plan = plan_tiles(p, team);
  return plan.threads * plan.each;
}

inline void on_tiles(const Int4Linear& p, char* scratch, const Team& team) {
  const Linear& l = p.linear;
  const TilePlan plan = plan_tiles(p, team);
  const int64_t rows = l.rows;
  const bool few = rows <= kPanel, single = rows == 1;
  team.share(plan.threads, plan.items, [&](int64_t first, int64_t last, int thread) {
    Arena own{scratch + thread * plan.each};
    char *x = own.take<char>(plan.x_bytes), *natural = own.take<char>(plan.natural_bytes), *weights = own.take<char>(plan.weight_bytes);
    float* sums = own.take<float>(plan.sums_bytes / 4);
    configure_columns(single ? 1 : kPanel);
    pack_rows(p, 0, rows, single, x, natural);
    for (int64_t i = first; i < last; ++i) {
      const Item item = item_of(l, i * plan.width * kPanel, plan.width);
      if (few) few_rows(p, item, x, rows, sums, weights);
      else many_rows(p, item, x, rows, sums, weights);
    }
    _tile_release();
  });
}

}  // namespace
}  // namespace cvmk::gemm

#endif
