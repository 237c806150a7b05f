// int4_linear: weights are dequantised a cache's worth at a time, each through a table of its sixteen values.
//
// bfloat16 rows on AMX: weights rounded to bfloat16, as the reference does, and multiplied on tiles as W x^T. Everything else: float32
// weights and dot products over vectors of inputs. A row goes through the same operations whatever the other rows and the threads are.
#include "gemm/common.inl"
#include "gemm/tiles.inl"

namespace {

constexpr int64_t kBlock = 128;  // inputs of an output that stand together in the packed weight: 64 bytes

inline int64_t blocks_of(const Int4Linear& p) { return up(p.linear.inputs, kBlock) / kBlock; }

// The words of output 16 panel + n of the weight from a block of inputs on; 512 words further is the next block.
inline const uint16_t* words_of(const Int4Linear& p, int64_t panel, int n, int64_t block) {
  return p.weight + ((panel * blocks_of(p) + block) * kPanel + n) * (kBlock / 4);
}

// Where the scale (and zero) of output 16 panel + n and group 0 stands; 16 further is the next group.
inline int64_t group_at(const Int4Linear& p, int64_t panel, int n) { return panel * (p.linear.inputs / p.group) * kPanel + n; }

CVMK_INLINE F ramp() {
  F v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// -- products on vectors -----------------------------------------------------------------------------------------------------------
typedef uint16_t W __attribute__((vector_size(kLanes * 2)));

// Inputs [128 block, 128 block + count) of one output as floats, count at most 128 and a multiple of 32.
inline void dequantise(const Int4Linear& p, int64_t panel, int n, int64_t block, int64_t count, float* to) {
  const uint16_t* words = words_of(p, panel, n, block);
  const int64_t groups = group_at(p, panel, n);
  float scale = 0.0f, zero = 8.0f;
#if defined(__AVX512F__)
  F table = F{};
#endif
  for (int64_t k = 0; k < count; k += 32) {
    const int j = static_cast<int>(k / 32);
    if (k == 0 || (block * kBlock + k) % p.group == 0) {
      const int64_t at = groups + (block * kBlock + k) / p.group * kPanel;
      scale = p.linear.scales[at];
      if (p.zeros) zero = static_cast<float>(p.zeros[at]);
#if defined(__AVX512F__)
      table = (ramp() - zero) * scale;
#endif
    }
    for (int i = 0; i < 32; i += kLanes) {
      W w;
      memcpy(&w, words + i, sizeof w);
      const simd::U q = __builtin_convertvector(w, simd::U) >> (4 * j);
#if defined(__AVX512F__)
      simd::store(to + k + i, simd::bits<F>(_mm512_permutexvar_ps(simd::bits<__m512i>(q), simd::bits<__m512>(table))));
#else
      simd::store(to + k + i, (__builtin_convertvector(simd::bits<I>(q & 15u), F) - zero) * scale);
#endif
    }
  }
}

#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotOutputs = 4;
#else
constexpr int kDotRows = 2, kDotOutputs = 2;
#endif

// sums [rows][outputs][lanes] += x [rows][count] w [outputs][kBlock]^T, a lane for the inputs of its remainder.
template <int kRows>
inline void dot_block(const float* x, int64_t x_stride, const float* w, int64_t count, float* sums, int64_t stride) {
  F sum[kRows][kDotOutputs];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kDotOutputs; ++c) sum[r][c] = simd::load(sums + r * stride + c * kLanes);
  for (int64_t k = 0; k < count; k += kLanes) {
    F b[kDotOutputs];
#pragma GCC unroll 4
    for (int c = 0; c < kDotOutputs; ++c) b[c] = simd::load(w + c * kBlock + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F a = simd::load(x + r * x_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < kDotOutputs; ++c) sum[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kDotOutputs; ++c) simd::store(sums + r * stride + c * kLanes, sum[r][c]);
}

constexpr int64_t kDotRowsAtOnce = 32;

// `sums` has room for [rows][16][lanes] floats and the item's [rows][count * 16] behind them.
inline void vector_item(const Int4Linear& p, const Item& item, const float* x, int64_t row, int64_t rows, float* sums) {
  const int64_t inputs = p.linear.inputs, stride = kPanel * kLanes, out_stride = item.count * kPanel;
  float* out = sums + kDotRowsAtOnce * stride;
  float w[kDotOutputs * kBlock];
  for (int i = 0; i < item.count; ++i) {
    memset(sums, 0, static_cast<size_t>(rows * stride) * sizeof(float));
    for (int64_t k = 0; k < inputs; k += kBlock) {
      const int64_t n = least(kBlock, inputs - k);
      for (int c = 0; c < kPanel; c += kDotOutputs) {
        for (int j = 0; j < kDotOutputs; ++j) dequantise(p, item.panels[i], c + j, k / kBlock, n, w + j * kBlock);
        int64_t r = 0;
        for (; r + kDotRows <= rows; r += kDotRows) dot_block<kDotRows>(x + r * inputs + k, inputs, w, n, sums + r * stride + c * kLanes, stride);
        for (; r < rows; ++r) dot_block<1>(x + r * inputs + k, inputs, w, n, sums + r * stride + c * kLanes, stride);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < kPanel; ++c) out[r * out_stride + i * kPanel + c] = simd::sum(simd::load(sums + r * stride + c * kLanes));
  }
  finish(p.linear, item, static_cast<const float*>(out), out_stride, nullptr, row, rows);
}

// -- products on tiles -------------------------------------------------------------------------------------------------------------
#if CVMK_GEMM_TILES
constexpr int64_t kTileInputs = 32;
constexpr int64_t kBlockTiles = kBlock / kTileInputs;

// The values of two outputs' nibbles in bfloat16, each table twice, for the fifth bit of an index is the next nibble's.
template <bool kZeros>
CVMK_INLINE void tables(const Int4Linear& p, int64_t at, __m512i* first, __m512i* second) {
  const __m512 shifted = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  __m512 a = shifted, b = shifted;
  if (kZeros) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    a = _mm512_sub_ps(codes, _mm512_set1_ps(static_cast<float>(p.zeros[at])));
    b = _mm512_sub_ps(codes, _mm512_set1_ps(static_cast<float>(p.zeros[at + 1])));
  }
  a = _mm512_mul_ps(a, _mm512_set1_ps(p.linear.scales[at]));
  b = _mm512_mul_ps(b, _mm512_set1_ps(p.linear.scales[at + 1]));
  const __m512i both = simd::bits<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  *first = _mm512_shuffle_i64x2(both, both, 0x44);
  *second = _mm512_shuffle_i64x2(both, both, 0xEE);
}

// A block of a panel as tiles [kBlockTiles][16 outputs][32 inputs]; the inputs behind the last one are whatever.
template <bool kZeros>
inline void dequantise_block(const Int4Linear& p, int64_t panel, int64_t block, char* to) {
  const int64_t last = p.linear.inputs / p.group - 1;
  const uint16_t* words = words_of(p, panel, 0, block);
  for (int n = 0; n < kPanel; n += 2, words += kBlock / 2, to += 128) {
    const __m512i w0 = _mm512_loadu_si512(words), w1 = _mm512_loadu_si512(words + kBlock / 4);
    const int64_t groups = group_at(p, panel, n);
    __m512i t0, t1;
    if (p.group == kBlock) {
      tables<kZeros>(p, groups + block * kPanel, &t0, &t1);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(w0, t0));
      _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi16(w1, t1));
#pragma GCC unroll 3
      for (int j = 1; j < 4; ++j) {
        _mm512_storeu_si512(to + j * kTile, _mm512_permutexvar_epi16(_mm512_srli_epi16(w0, static_cast<unsigned>(4 * j)), t0));
        _mm512_storeu_si512(to + j * kTile + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(w1, static_cast<unsigned>(4 * j)), t1));
      }
    } else {
      const int64_t group = p.group / kTileInputs, first = block * kBlockTiles;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (j == 0 || j % group == 0) tables<kZeros>(p, groups + least((first + j) / group, last) * kPanel, &t0, &t1);
        _mm512_storeu_si512(to + j * kTile, _mm512_permutexvar_epi16(_mm512_srli_epi16(w0, static_cast<unsigned>(4 * j)), t0));
        _mm512_storeu_si512(to + j * kTile + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(w1, static_cast<unsigned>(4 * j)), t1));
      }
    }
  }
}

inline void dequantise_any(const Int4Linear& p, int64_t panel, int64_t block, char* to) {
  if (p.zeros) dequantise_block<true>(p, panel, block, to);
  else dequantise_block<false>(p, panel, block, to);
}

// 16 rows of 16 words, `stride` bytes apart -> their transpose, `to_stride` bytes apart.
inline void transpose(const char* from, int64_t stride, char* to, int64_t to_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4 q + i] holds, in its 128-bit lane l, column 4 l + i of rows 4 q ... 4 q + 3
    const __m512i low01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44), high01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44), high23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xEE);
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(low01, low23, 0xDD));
    _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(high01, high23, 0xDD));
  }
}

// Up to 16 rows of x from `row` on, as tiles [inputs / 32][16 pairs of inputs][16 rows][2]; one row alone as it is.
inline void pack_rows(const Int4Linear& p, int64_t row, int64_t rows, bool single, char* to) {
  const Linear& l = p.linear;
  const uint16_t* x = static_cast<const uint16_t*>(l.x) + row * l.x_stride;
  if (single) {
    uint16_t* all = reinterpret_cast<uint16_t*>(to);
    if (!p.order) memcpy(all, x, static_cast<size_t>(l.inputs) * 2);
    else
      for (int64_t k = 0; k < l.inputs; ++k) all[k] = x[p.order[k]];
    return;
  }
  alignas(64) uint16_t some[16 * 32];
  for (int64_t k = 0; k < l.inputs; k += kTileInputs, to += kTile) {
    const char* from = reinterpret_cast<const char*>(x + k);
    int64_t stride = l.x_stride * 2;
    if (p.order || rows < 16) {
      for (int64_t r = 0; r < 16; ++r) {
        uint16_t* one = some + r * 32;
        if (r >= rows) memset(one, 0, 64);
        else if (!p.order) memcpy(one, x + r * l.x_stride + k, 64);
        else
          for (int i = 0; i < 32; ++i) one[i] = x[r * l.x_stride + p.order[k + i]];
      }
      from = reinterpret_cast<const char*>(some);
      stride = 64;
    }
    transpose(from, stride, to, 64);
  }
}

// Tiles 0 ... 3 for sums and 4 for x have `columns` columns, the others 16.
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

// One step of `kPanels` panels (tiles `next` bytes apart) times a tile of x.
template <int kPanels>
CVMK_INLINE void step_of(const char* w, int64_t next, const char* x, int64_t x_stride) {
  _tile_loadd(4, x, x_stride);
  _tile_loadd(5, w, 64);
  _tile_dpbf16ps(0, 5, 4);
  if constexpr (kPanels > 1) {
    _tile_loadd(6, w + next, 64);
    _tile_dpbf16ps(1, 6, 4);
  }
  if constexpr (kPanels > 2) {
    _tile_loadd(7, w + 2 * next, 64);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, w + 3 * next, 64);
    _tile_dpbf16ps(3, 5, 4);
  }
}

// Panels times up to 16 rows: sums [kPanels][16 outputs][x_stride / 4 rows]. The tiles of one block are multiplied while the next one is
// dequantised; `weights` has room for two blocks of every panel.
template <int kPanels>
inline void few_rows(const Int4Linear& p, const int64_t* panels, const char* x, int64_t x_stride, char* sums, char* weights) {
  constexpr int64_t kNext = kBlockTiles * kTile;
  const int64_t steps = p.linear.inputs / kTileInputs, blocks = blocks_of(p), x_tile = x_stride * kPanel;
  _tile_zero(0);
  if constexpr (kPanels > 1) _tile_zero(1);
  if constexpr (kPanels > 2) _tile_zero(2);
  if constexpr (kPanels > 2) _tile_zero(3);
  for (int64_t b = 0; b <= blocks; ++b) {
    char* mine = weights + b % 2 * kPanels * kNext;
    const char* before = weights + (b + 1) % 2 * kPanels * kNext;
    for (int64_t i = 0; i < kBlockTiles; ++i) {
      if (b < blocks)
        for (int64_t q = i * kPanels / kBlockTiles; q < (i + 1) * kPanels / kBlockTiles; ++q) dequantise_any(p, panels[q], b, mine + q * kNext);
      const int64_t s = (b - 1) * kBlockTiles + i;
      if (b > 0 && s < steps) step_of<kPanels>(before + i * kTile, kNext, x + s * x_tile, x_stride);
    }
  }
  const int64_t next = x_stride * kPanel;
  _tile_stored(0, sums, x_stride);
  if constexpr (kPanels > 1) _tile_stored(1, sums + next, x_stride);
  if constexpr (kPanels > 2) _tile_stored(2, sums + 2 * next, x_stride);
  if constexpr (kPanels > 2) _tile_stored(3, sums + 3 * next, x_stride);
}

// An item for up to 16 rows.
inline void small_item(const Int4Linear& p, const Item& item, const char* x, int64_t row, int64_t rows, float* sums, char* weights) {
  const int64_t x_stride = rows == 1 ? 4 : 64, each = kPanel * x_stride / 4, stride = item.count * kPanel;
  int i = 0;
  for (; i + 4 <= item.count; i += 4) few_rows<4>(p, item.panels + i, x, x_stride, reinterpret_cast<char*>(sums + i * each), weights);
  for (; i + 2 <= item.count; i += 2) few_rows<2>(p, item.panels + i, x, x_stride, reinterpret_cast<char*>(sums + i * each), weights);
  if (i < item.count) few_rows<1>(p, item.panels + i, x, x_stride, reinterpret_cast<char*>(sums + i * each), weights);
  if (rows == 1) return finish(p.linear, item, static_cast<const float*>(sums), stride, nullptr, row, rows);
  float* turned = sums + item.count * each;
  for (i = 0; i < item.count; ++i)
    transpose(reinterpret_cast<const char*>(sums + i * each), 64, reinterpret_cast<char*>(turned + i * kPanel), stride * 4);
  finish(p.linear, item, static_cast<const float*>(turned), stride, nullptr, row, rows);
}

// Sums [count * 16 outputs][32 rows] of rows r ... r + rows of a round to the output; `turned` has room for [32][count * 16].
inline void turn_and_finish(const Int4Linear& p, const Item& item, const float* sums, float* turned, int64_t row, int64_t rows) {
  const int64_t stride = item.count * kPanel;
  for (int i = 0; i < item.count; ++i)
    for (int64_t j = 0; j < rows; j += kPanel)
      transpose(reinterpret_cast<const char*>(sums + i * kPanel * 32 + j), 128, reinterpret_cast<char*>(turned + j * stride + i * kPanel), stride * 4);
  finish(p.linear, item, static_cast<const float*>(turned), stride, nullptr, row, rows);
}

constexpr int64_t kWholeSteps = 32;  // so many steps of an item's panels stand dequantised at one time, in the second cache

// An item for all rows of a round, where the inputs are few: its panels are dequantised once, and a tile of sums is finished at once.
inline void whole_item(const Int4Linear& p, const Item& item, const char* x, int64_t row, int64_t rows, float* sums, char* weights) {
  const int64_t steps = p.linear.inputs / kTileInputs, next = blocks_of(p) * kBlockTiles * kTile;
  float* turned = sums + item.count * kPanel * 32;
  for (int i = 0; i < item.count; ++i)
    for (int64_t b = 0; b < blocks_of(p); ++b) dequantise_any(p, item.panels[i], b, weights + i * next + b * kBlockTiles * kTile);
  for (int64_t r = 0; r < rows; r += 32) {
    const char* b[2] = {x + r * steps * kStep, x + (r + kPanel) * steps * kStep};
    expect(p.linear, item, row + r, least(32, rows - r));
    for (int g = 0; g < item.count; g += 2)
      tile_block<true>(weights + g * next, next, item.count - g < 2 ? 1 : 2, b, rows - r > kPanel ? 2 : 1, steps, sums + g * kPanel * 32, 128, true);
    turn_and_finish(p, item, sums, turned, row + r, least(32, rows - r));
  }
}

// An item for all rows of a round: a part of the inputs of two panels at a time, which stays in the first cache while the rows pass.
// `sums` has room for [rows / 32][count * 16 outputs][32 rows] and one turned tile.
inline void large_item(const Int4Linear& p, const Item& item, const char* x, int64_t row, int64_t rows, float* sums, char* weights) {
  const int64_t steps = p.linear.inputs / kTileInputs, each = item.count * kPanel * 32;
  float* turned = sums + up(rows, 32) / 32 * each;
  for (int64_t s = 0; s < steps; s += kStepsInL1) {
    const int64_t n = least(kStepsInL1, steps - s);
    for (int g = 0; g < item.count; g += 2) {
      const int width = item.count - g < 2 ? 1 : 2;
      for (int i = 0; i < width; ++i)
        for (int64_t b = 0; b < up(n, kBlockTiles) / kBlockTiles; ++b)
          dequantise_any(p, item.panels[g + i], s / kBlockTiles + b, weights + (i * kStepsInL1 + b * kBlockTiles) * kTile);
      const bool last = s + n == steps && g + width == item.count;
      for (int64_t r = 0; r < rows; r += 32) {
        const char* b[2] = {x + r * steps * kStep + s * kTile, x + (r + kPanel) * steps * kStep + s * kTile};
        float* to = sums + r / 32 * each;
        if (last) expect(p.linear, item, row + r, least(32, rows - r));
        tile_block<true>(weights, kStepsInL1 * kTile, width, b, rows - r > kPanel ? 2 : 1, n, to + g * kPanel * 32, 128, s == 0);
        if (last) turn_and_finish(p, item, to, turned, row + r, least(32, rows - r));
      }
    }
  }
}
#endif

// -- the whole ---------------------------------------------------------------------------------------------------------------------
// A row of x in stored order, as floats.
template <int kType>
inline void float_row(const Int4Linear& p, const void* x, float* to) {
  const int64_t inputs = p.linear.inputs;
  if (!p.order) {
    for (int64_t k = 0; k < inputs; k += kLanes) simd::store(to + k, load_as<kType>(x, k));
    return;
  }
  for (int64_t k = 0; k < inputs; ++k) {
    if (kType == kFloat32) {
      to[k] = static_cast<const float*>(x)[p.order[k]];
    } else {
      const uint16_t h = static_cast<const uint16_t*>(x)[p.order[k]];
      to[k] = kType == kBfloat16 ? simd::bits<float>(static_cast<uint32_t>(h) << 16) : simd::half_to_float(h);
    }
  }
}

inline void copy_row(const Int4Linear& p, int64_t row, float* to) {
  const Linear& l = p.linear;
  const char* from = static_cast<const char*>(l.x) + row * l.x_stride * element_bytes(l.x_dtype);
  if (l.x_dtype == kFloat32) float_row<kFloat32>(p, from, to);
  else if (l.x_dtype == kBfloat16) float_row<kBfloat16>(p, from, to);
  else float_row<kFloat16>(p, from, to);
}

inline int on_vectors(const Int4Linear& p) {
  const Linear& l = p.linear;
  const int width = l.activation == kSwiglu ? 1 : 2;
  const int threads = l.rows * l.inputs * l.outputs <= (1 << 17) ? 1 : threads::limit();
  const int64_t round = least(l.rows, kDotRowsAtOnce), items = up(out_columns(l), width * kPanel) / (width * kPanel);
  const int64_t sums_each = up(kDotRowsAtOnce * kPanel * (kLanes + 2 * width + 1), 16);
  Scratch scratch{static_cast<char*>(l.scratch((round * l.inputs + threads * sums_each) * 4 + 256))};
  if (!scratch.next) return 1;
  float *x = scratch.take<float>(round * l.inputs), *sums = scratch.take<float>(threads * sums_each);
  const auto nothing = [] {};
  for (int64_t start = 0; start < l.rows; start += round) {
    const int64_t rows = least(round, l.rows - start);
    const auto copy = [&](int64_t r) { copy_row(p, start + r, x + r * l.inputs); };
    const bool shared = rows * l.inputs > 16384;
    for (int64_t r = 0; !shared && r < rows; ++r) copy(r);
    const auto one = [&](int64_t i, int thread) { vector_item(p, item_of(l, i * width * kPanel, width), x, start, rows, sums + thread * sums_each); };
    two_loops(threads, shared ? rows : 0, copy, items, nothing, one, nothing);
  }
  return 0;
}

#if CVMK_GEMM_TILES
constexpr int64_t kRoundInputs = 1 << 19;  // bfloat16 inputs that stand packed at one time

inline int on_tiles(const Int4Linear& p) {
  const Linear& l = p.linear;
  const int64_t columns = out_columns(l), wanted = kRoundInputs / l.inputs / 32 * 32;
  const int64_t round = least(up(l.rows, 32), wanted < 32 ? 32 : wanted > 512 ? 512 : wanted);
  const int threads = l.rows * l.inputs * l.outputs <= (1 << 18) ? 1 : threads::limit();
  const bool small = l.rows <= kPanel, whole = !small && l.inputs <= kWholeSteps * kTileInputs;
  int width = small ? 4 : 8;
  while (width > 2 && up(columns, width * kPanel) / (width * kPanel) < 2 * threads) width /= 2;
  if (l.activation == kSwiglu) width /= 2;
  const int most = 2 * width + 1;  // panels of an item
  const int64_t sums_each = (small ? kPanel : whole ? 64 : round + 32) * most * kPanel + kPanel * kPanel * most;
  const int64_t weight_bytes = whole ? most * blocks_of(p) * kBlockTiles * kTile : 2 * kBlockTiles * 4 * kTile;
  Scratch scratch{static_cast<char*>(l.scratch(round * l.inputs * 2 + threads * (sums_each * 4 + weight_bytes) + 256))};
  if (!scratch.next) return 1;
  char* x = scratch.take<char>(round * l.inputs * 2);
  float* all_sums = scratch.take<float>(threads * sums_each);
  char* all_weights = scratch.take<char>(threads * weight_bytes);
  const int64_t items = up(columns, width * kPanel) / (width * kPanel);
  const auto leave = [] { _tile_release(); };
  for (int64_t start = 0; start < l.rows; start += round) {
    const int64_t rows = least(round, l.rows - start), bands = up(rows, kPanel) / kPanel;
    const bool single = small && rows == 1, shared = rows * l.inputs > 32768;
    const auto pack = [&](int64_t i) { pack_rows(p, start + i * kPanel, least(kPanel, rows - i * kPanel), single, x + i * kPanel * l.inputs * 2); };
    for (int64_t i = 0; !shared && i < bands; ++i) pack(i);
    const auto enter = [&] { configure_columns(single ? 1 : kPanel); };
    const auto one = [&](int64_t i, int thread) {
      const Item item = item_of(l, i * width * kPanel, width);
      float* sums = all_sums + thread * sums_each;
      char* weights = all_weights + thread * weight_bytes;
      if (small) small_item(p, item, x, start, rows, sums, weights);
      else if (whole) whole_item(p, item, x, start, rows, sums, weights);
      else large_item(p, item, x, start, rows, sums, weights);
    };
    two_loops(threads, shared ? bands : 0, pack, items, enter, one, leave);
  }
  return 0;
}
#endif

inline int int4_linear_level(const Int4Linear& p) {
#if CVMK_GEMM_TILES
  if (p.linear.x_dtype == kBfloat16) return on_tiles(p);
#endif
  return on_vectors(p);
}

}  // namespace
