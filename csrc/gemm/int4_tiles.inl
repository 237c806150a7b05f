// int4_linear on AMX tiles: weights rounded to bfloat16, as the reference does, are the left operand, rows of x the columns of the right one.
//
// So a row of a weight tile holds one output, whose sixteen values fit into one table; sums come out with rows of x along the vectors and
// are turned on their way to the output. Every thread turns the rows of x that it needs: nothing is waited for.
#pragma once
#include "gemm/int4_rows.inl"
#include "gemm/int4_weight.inl"

#if CVMK_GEMM_TILES

namespace {

constexpr int64_t kBlockBytes = kBlockTiles * kTile;  // a block of a panel, dequantised
constexpr int64_t kPart = 2;                          // blocks that are multiplied at one time

// -- products ----------------------------------------------------------------------------------------------------------------------
// Tiles for sums (0 ... 3) and for x (4, and 5 of two bands) have `columns` columns, those for weights 16.
inline void configure_columns(int64_t columns) {
  TileConfig c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; ++i) {
    c.bytes_per_row[i] = static_cast<uint16_t>(i <= 4 ? columns * 4 : 64);
    c.rows[i] = kPanel;
  }
  _tile_loadconfig(&c);
}

// One step: `kPanels` tiles of weights (kBlockBytes apart) times one or two tiles of x (`x_next` bytes apart).
template <int kPanels, int kTiles>
CVMK_INLINE void step_of(const char* w, const char* x, int64_t x_stride, int64_t x_next) {
  _tile_loadd(4, x, x_stride);
  if constexpr (kTiles == 2) {
    _tile_loadd(6, w, kStep);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(5, x + x_next, kStep);
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

// Panels of an item that are multiplied together, and where they stand dequantised: [ring][kPanels][kBlockTiles][1 KiB].
struct Group {
  const int64_t* panels;
  char* weights;
  int64_t ring;  // blocks that stand at one time, at least two
};

// Tiles of sums in memory: of kTiles == 2 the second tile of rows stands beside the first, panels stand one below the other.
template <int kPanels, int kTiles, int kSum>
CVMK_INLINE char* sum_at(char* sums, int64_t stride) {
  return sums + kSum / kTiles * kPanel * stride + kSum % kTiles * kStep;
}

template <int kPanels, int kTiles>
CVMK_INLINE void begin_sums(char* sums, int64_t stride, bool first) {
  if (first) {
    _tile_zero(0);
    if constexpr (kPanels * kTiles > 1) _tile_zero(1);
    if constexpr (kPanels * kTiles > 2) _tile_zero(2);
    if constexpr (kPanels * kTiles > 2) _tile_zero(3);
  } else {
    _tile_loadd(0, (sum_at<kPanels, kTiles, 0>(sums, stride)), stride);
    if constexpr (kPanels * kTiles > 1) _tile_loadd(1, (sum_at<kPanels, kTiles, 1>(sums, stride)), stride);
    if constexpr (kPanels * kTiles > 2) _tile_loadd(2, (sum_at<kPanels, kTiles, 2>(sums, stride)), stride);
    if constexpr (kPanels * kTiles > 2) _tile_loadd(3, (sum_at<kPanels, kTiles, 3>(sums, stride)), stride);
  }
}

template <int kPanels, int kTiles>
CVMK_INLINE void end_sums(char* sums, int64_t stride) {
  _tile_stored(0, (sum_at<kPanels, kTiles, 0>(sums, stride)), stride);
  if constexpr (kPanels * kTiles > 1) _tile_stored(1, (sum_at<kPanels, kTiles, 1>(sums, stride)), stride);
  if constexpr (kPanels * kTiles > 2) _tile_stored(2, (sum_at<kPanels, kTiles, 2>(sums, stride)), stride);
  if constexpr (kPanels * kTiles > 2) _tile_stored(3, (sum_at<kPanels, kTiles, 3>(sums, stride)), stride);
}

// Sums [kPanels * 16 outputs][rows] of a group of packed panels. A block is dequantised while the one before it is multiplied.
template <int kPanels, int kTiles>
inline void fresh_product(const Int4Linear& p, const Group& group, const Columns& c, char* sums) {
  const int64_t steps = p.linear.inputs / kTileInputs, blocks = blocks_of(p), x_tile = kPanel * c.stride;
  const char *x = c.x, *before = group.weights;
  begin_sums<kPanels, kTiles>(sums, c.sums_stride, true);
  for (int64_t b = 0; b <= blocks; ++b) {
    char* now = group.weights + (group.ring == 2 ? b & 1 : b) * kPanels * kBlockBytes;
    const int64_t n = b == 0 ? 0 : least(kBlockTiles, steps - (b - 1) * kBlockTiles);
    for (int64_t i = 0; i < kBlockTiles; ++i) {
      if (b < blocks)
        for (int64_t q = i * kPanels / kBlockTiles; q < (i + 1) * kPanels / kBlockTiles; ++q) dequantise_any(p, group.panels[q], b, now + q * kBlockBytes);
      if (i < n) step_of<kPanels, kTiles>(before + i * kTile, x + i * x_tile, c.stride, c.next);
    }
    x += n * x_tile;
    before = now;
  }
  end_sums<kPanels, kTiles>(sums, c.sums_stride);
}

// Adds the products of blocks [first, last) of a group that stands dequantised.
template <int kPanels, int kTiles>
inline void product(const Int4Linear& p, const Group& group, const Columns& c, int64_t first, int64_t last, char* sums) {
  const int64_t steps = p.linear.inputs / kTileInputs, x_tile = kPanel * c.stride;
  const char *x = c.x + first * kBlockTiles * x_tile, *w = group.weights + first * kPanels * kBlockBytes;
  begin_sums<kPanels, kTiles>(sums, c.sums_stride, first == 0);
  for (int64_t s = first * kBlockTiles; s < least(last * kBlockTiles, steps); s += kBlockTiles, w += kPanels * kBlockBytes) {
    const int64_t n = least(kBlockTiles, steps - s);
    for (int64_t i = 0; i < n; ++i, x += x_tile) step_of<kPanels, kTiles>(w + i * kTile, x, c.stride, c.next);
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
      simd::store(to->at[h] + v, load_any(l.bias, l.bias_dtype, h * columns + item.column + v, static_cast<int>(least(kLanes, width - v))));
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
    turn(a);
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
inline void few_rows(const Int4Linear& p, const Item& item, const char* x, int64_t row, int64_t rows, float* sums, char* weights) {
  const Linear& l = p.linear;
  const int64_t stride = rows == 1 ? 1 : kPanel;
  const Columns c{x, stride * 4, 0, stride * 4};
  for (int i = 0; i < item.count;) {
    const int width = item.count - i >= 4 ? 4 : item.count - i >= 2 ? 2 : 1;
    const Group group{item.panels + i, weights, 2};
    char* to = reinterpret_cast<char*>(sums + i * kPanel * stride);
    if (width == 4) fresh_product<4, 1>(p, group, c, to);
    else if (width == 2) fresh_product<2, 1>(p, group, c, to);
    else fresh_product<1, 1>(p, group, c, to);
    i += width;
  }
  if (rows == 1) return finish(l, item, static_cast<const float*>(sums), item.count * kPanel, nullptr, row, rows);
  Biases biases;
  if (l.bias) gather_biases(l, item, &biases);
  finish_rows(l, item, sums, stride, biases, row, rows);
}

// Where an item's panels stand dequantised: every block of every panel, or only two of each where they are needed once.
inline int64_t ring_of(const Int4Linear& p, int64_t rows) { return rows <= kBand ? 2 : blocks_of(p); }

// An item for a band of up to 32 rows, two panels at a time; with `fresh` they are dequantised on the way. Of panels that stand already a part
// of the inputs is multiplied at one time, so that rows and sums stay in the first cache while the panels pass.
inline void band_of(const Int4Linear& p, const Item& item, const Columns& c, int64_t rows, int64_t ring, bool fresh, float* sums, char* weights) {
  const int64_t blocks = blocks_of(p), part = fresh ? blocks : kPart;
  for (int64_t b = 0; b < blocks; b += part)
    for (int g = 0; g < item.count; g += 2) {
      const bool pair = item.count - g > 1;
      const Group group{item.panels + g, weights + g * ring * kBlockBytes, ring};
      char* to = reinterpret_cast<char*>(sums + g * kPanel * kBand);
      if (fresh && pair) fresh_product<2, 2>(p, group, c, to);
      else if (fresh) fresh_product<1, 2>(p, group, c, to);
      else if (pair && rows > kPanel) product<2, 2>(p, group, c, b, b + part, to);
      else if (pair) product<2, 1>(p, group, c, b, b + part, to);
      else if (rows > kPanel) product<1, 2>(p, group, c, b, b + part, to);
      else product<1, 1>(p, group, c, b, b + part, to);
    }
}

// -- the whole -----------------------------------------------------------------------------------------------------------------------
constexpr int64_t kAloneTiles = 1 << 17;      // below so many multiplications the calling thread does the work
constexpr int64_t kRoundInputs = 1 << 18;     // of rows that stand turned at one time, in the second cache of a thread
constexpr int64_t kStandingWeights = 1 << 18;  // that stand dequantised at one time, in the second cache of a thread
constexpr int64_t kOwnRows = 128;             // where every thread has so many, no other has them too

// How a call is divided into units: rounds of rows times blocks of `items` items of `width` panels of columns.
struct Division {
  int limit, width, most;  // threads at most; panels of an item's columns, and of all that it needs
  int64_t items, round, blocks, units;
  bool turned;  // all rows of a round stand turned; else those of a band
};

inline Division divide(const Int4Linear& p) {
  const Linear& l = p.linear;
  const int64_t columns = out_columns(l);
  const bool few = l.rows <= kPanel, gated = l.activation == kSwiglu;
  Division d;
  d.limit = l.rows * l.inputs * l.outputs <= kAloneTiles ? 1 : threads::limit();
  d.width = few || l.inputs > 1024 ? 4 : 8;
  while (d.width > 2 && up(columns, d.width * kPanel) / (d.width * kPanel) < 2 * d.limit) d.width /= 2;
  if (gated) d.width /= 2;
  d.most = gated ? 2 * d.width + 1 : d.width;
  const int64_t all = up(columns, d.width * kPanel) / (d.width * kPanel), fit = kStandingWeights / (l.inputs * d.most * kPanel);
  const bool apart = l.rows >= kOwnRows * d.limit && l.rows * 4 >= l.outputs;  // else threads share the columns
  d.turned = few || fit < 2;
  d.items = d.turned ? 1 : least(fit, apart ? all : (all + d.limit - 1) / d.limit);
  d.round = few ? kPanel : rows_of_round(l.rows, d.turned ? kRoundInputs / l.inputs : l.rows + kBand, apart ? d.limit : 1);
  d.blocks = (all + d.items - 1) / d.items;
  d.units = (l.rows + d.round - 1) / d.round * d.blocks;
  return d;
}

// What a thread holds.
struct Hold {
  char *x, *natural, *weights;
  float* sums;
};

// Rows [row, row + rows) times the columns from `column` on. All rows stand in hold.x where they are turned already.
inline void many_rows(const Int4Linear& p, const Division& d, int64_t column, int64_t row, int64_t rows, const Hold& hold) {
  const Linear& l = p.linear;
  const int64_t next = l.inputs * kPanel * 2, ring = ring_of(p, rows), each = (d.most + 1) * ring * kBlockBytes;
  const int64_t end = least(out_columns(l), column + d.items * d.width * kPanel);
  Biases biases;
  for (int64_t r = 0; r < rows; r += kBand) {
    const int64_t n = least(kBand, rows - r);
    if (!d.turned) pack_rows(p, row + r, n, false, hold.x, hold.natural);
    const Columns c{d.turned ? hold.x + r / kPanel * next : hold.x, kStep, next, kBand * 4};
    char* weights = hold.weights;
    for (int64_t at = column; at < end; at += d.width * kPanel, weights += each) {
      const Item item = item_of(l, at, d.width);
      expect(l, item, row + r, n);
      band_of(p, item, c, n, ring, r == 0, hold.sums, weights);
      if (l.bias) gather_biases(l, item, &biases);
      for (int64_t j = 0; j < n; j += kPanel) finish_rows(l, item, hold.sums + j, kBand, biases, row + r + j, least(kPanel, n - j));
    }
  }
}

inline int on_tiles(const Int4Linear& p) {
  const Linear& l = p.linear;
  if (l.rows == 0) return 0;
  const Division d = divide(p);
  const bool few = l.rows <= kPanel, single = l.rows == 1;
  const int threads = static_cast<int>(least(d.limit, d.units));
  const int64_t x_bytes = (d.turned ? up(d.round, kBand) : kBand) * l.inputs * 2, natural_bytes = p.order && !single ? l.inputs * kPanel * 2 : 0;
  const int64_t sums_bytes = (d.most + 2) * kPanel * kBand * 4, ring = ring_of(p, least(d.round, l.rows));
  const int64_t weight_bytes = few ? 8 * kBlockBytes : d.items * (d.most + 1) * (ring < 2 ? 2 : ring) * kBlockBytes;
  const int64_t each = up(x_bytes + natural_bytes + sums_bytes + weight_bytes, 4096) + 1024;
  char* scratch = static_cast<char*>(l.scratch(threads * each));
  if (!scratch) return 1;
  share(threads, d.units, [&](int64_t first, int64_t last, int thread) {
    Scratch own{scratch + thread * each};
    Hold hold;
    hold.x = own.take<char>(x_bytes);
    hold.natural = own.take<char>(natural_bytes);
    hold.weights = own.take<char>(weight_bytes);
    hold.sums = own.take<float>(sums_bytes / 4);
    configure_columns(single ? 1 : kPanel);
    int64_t packed = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / d.blocks * d.round, rows = least(d.round, l.rows - row), column = i % d.blocks * d.items * d.width * kPanel;
      if (d.turned && row != packed) pack_rows(p, row, rows, single, hold.x, hold.natural);
      packed = row;
      if (few) few_rows(p, item_of(l, column, d.width), hold.x, row, rows, hold.sums, hold.weights);
      else many_rows(p, d, column, row, rows, hold);
    }
    _tile_release();
  });
  return 0;
}

}  // namespace

#endif
