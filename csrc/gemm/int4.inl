// int4_linear: weights are dequantised a cache's worth at a time and used by all rows of a round.
//
// bfloat16 rows on AMX: weights rounded to bfloat16, as the reference does. Everything else: float32 weights, sums over even and odd
// inputs apart, added at the end. A row goes through the same operations whatever the other rows and the threads are.
#include "gemm/common.inl"
#include "gemm/tiles.inl"

namespace {

constexpr int64_t kWordInputs = 8;    // inputs of a panel in 16 words
constexpr int64_t kPartInputs = 128;  // inputs that are dequantised at a time for products on vectors
constexpr int kHalves = 2;            // of a panel: 8 outputs and two inputs fill 16 lanes

// The scales and zeros of a panel's group in the order of the words' lanes: [half][16].
struct Group {
  float scales[kHalves][kPanel], zeros[kHalves][kPanel];
};

inline void group_of(const Int4Linear& p, int64_t panel, int64_t index, Group* g) {
  const int64_t at = (panel * (p.linear.inputs / p.group) + index) * kPanel;
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 scales = _mm512_loadu_ps(p.linear.scales + at);
  _mm512_storeu_ps(g->scales[0], _mm512_permutexvar_ps(low, scales));
  _mm512_storeu_ps(g->scales[1], _mm512_permutexvar_ps(high, scales));
  if (!p.zeros) return;
  const __m512 zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.zeros + at))));
  _mm512_storeu_ps(g->zeros[0], _mm512_permutexvar_ps(low, zeros));
  _mm512_storeu_ps(g->zeros[1], _mm512_permutexvar_ps(high, zeros));
#else
  for (int i = 0; i < kPanel; ++i)
    for (int h = 0; h < kHalves; ++h) {
      g->scales[h][i] = p.linear.scales[at + h * kPanel / 2 + i / 2];
      g->zeros[h][i] = p.zeros ? static_cast<float>(p.zeros[at + h * kPanel / 2 + i / 2]) : 8.0f;
    }
#endif
}

// (nibble j of every word - zero) * scale
template <bool kZeros>
CVMK_INLINE F weights_of(simd::U words, int j, F scale, F zero) {
#if defined(__AVX512F__)
  const __m512 table = kZeros ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                              : _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const F q = simd::bits<F>(_mm512_permutexvar_ps(simd::bits<__m512i>(words >> (4 * j)), table));
  return kZeros ? (q - zero) * scale : q * scale;
#else
  return (__builtin_convertvector(simd::bits<I>((words >> (4 * j)) & 15u), F) - zero) * scale;
#endif
}

// -- products on vectors -----------------------------------------------------------------------------------------------------------
constexpr int kHalfVectors = kPanel / kLanes;
constexpr int kPanelVectors = kHalves * kHalfVectors;

// Inputs [start, start + count) of a panel as floats: [count / 2][half][16].
template <bool kZeros>
inline void dequantise(const Int4Linear& p, int64_t panel, int64_t start, int64_t count, float* to) {
  const uint32_t* words = p.weight + (panel * p.linear.inputs + start) / kWordInputs * kPanel;
  Group g;
  for (int64_t k = 0; k < count; k += kWordInputs, words += kPanel, to += kWordInputs * kPanel) {
    if (k == 0 || (start + k) % p.group == 0) group_of(p, panel, (start + k) / p.group, &g);
    for (int v = 0; v < kHalfVectors; ++v) {
      simd::U w;
      memcpy(&w, words + v * kLanes, sizeof w);
      for (int j = 0; j < 8; ++j) {
        const int h = j % 2;
        const F zero = kZeros || kLanes < 16 ? simd::load(g.zeros[h] + v * kLanes) : F{};
        simd::store(to + j * kPanel + v * kLanes, weights_of<kZeros>(w, j, simd::load(g.scales[h] + v * kLanes), zero));
      }
    }
  }
}

// sums [rows][vectors of panels] += x [rows][count] times weights [panels][count / 2][half][16].
template <int kRows, int kPanels>
inline void float_block(const float* x, int64_t inputs, const float* w, int64_t count, float* sums, int64_t stride) {
  constexpr int kWide = kPanels * kPanelVectors;
  typedef int64_t Pair __attribute__((vector_size(kLanes * 4)));
  F sum[kRows][kWide];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kWide; ++v) sum[r][v] = simd::load(sums + r * stride + v * kLanes);
  for (int64_t k = 0; k < count; k += 2) {
    F b[kWide];
#pragma GCC unroll 4
    for (int q = 0; q < kPanels; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) b[q * kPanelVectors + v] = simd::load(w + (q * count + k) * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int64_t two;
      memcpy(&two, x + r * inputs + k, 8);
      const F pair = simd::bits<F>(two - Pair{});
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sum[r][v] += pair * b[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kWide; ++v) simd::store(sums + r * stride + v * kLanes, sum[r][v]);
}

#if defined(__AVX512F__)
constexpr int kFloatRows = 6, kFloatPanels = 2;
#elif defined(__AVX2__)
constexpr int kFloatRows = 2, kFloatPanels = 1;
#else
constexpr int kFloatRows = 1, kFloatPanels = 1;
#endif

template <int kPanels>
inline void float_rows(int64_t rows, const float* x, int64_t inputs, const float* w, int64_t count, float* sums, int64_t stride) {
  int64_t r = 0;
  if constexpr (kFloatRows >= 6)
    for (; r + 6 <= rows; r += 6) float_block<6, kPanels>(x + r * inputs, inputs, w, count, sums + r * stride, stride);
  if constexpr (kFloatRows >= 2)
    for (; r + 2 <= rows; r += 2) float_block<2, kPanels>(x + r * inputs, inputs, w, count, sums + r * stride, stride);
  for (; r < rows; ++r) float_block<1, kPanels>(x + r * inputs, inputs, w, count, sums + r * stride, stride);
}

// The sums of even and odd inputs are added in place: [rows][count panels][half][16] -> [rows][count panels][16], stride unchanged.
inline void join(float* sums, int64_t rows, int64_t stride, int count) {
  for (int64_t r = 0; r < rows; ++r) {
    float* s = sums + r * stride;
    for (int i = 0; i < count * kPanel; ++i) s[i] = s[2 * i] + s[2 * i + 1];
  }
}

constexpr int64_t kFloatRowsAtOnce = 48;

inline void float_item(const Int4Linear& p, const Item& item, const float* x, int64_t row, int64_t rows, float* sums, float* weights) {
  const int64_t inputs = p.linear.inputs, stride = item.count * kPanel * kHalves;
  memset(sums, 0, static_cast<size_t>(rows * stride) * sizeof(float));
  for (int64_t k = 0; k < inputs; k += kPartInputs) {
    const int64_t n = least(kPartInputs, inputs - k);
    for (int i = 0; i < item.count;) {
      const int width = kFloatPanels >= 2 && item.count - i >= 2 ? 2 : 1;
      for (int j = 0; j < width; ++j) {
        if (p.zeros) dequantise<true>(p, item.panels[i + j], k, n, weights + j * n * kPanel);
        else dequantise<false>(p, item.panels[i + j], k, n, weights + j * n * kPanel);
      }
      float* to = sums + i * kPanel * kHalves;
      if (width == 2) {
        if constexpr (kFloatPanels >= 2) float_rows<2>(rows, x + k, inputs, weights, n, to, stride);
      } else {
        float_rows<1>(rows, x + k, inputs, weights, n, to, stride);
      }
      i += width;
    }
  }
  join(sums, rows, stride, item.count);
  finish(p.linear, item, static_cast<const float*>(sums), stride, nullptr, row, rows);
}

// -- products on tiles -------------------------------------------------------------------------------------------------------------
#if CVMK_GEMM_TILES
constexpr int64_t kTileInputs = 32;

// Inputs [start, start + count) of a panel as tiles of bfloat16: [count / 2][16 outputs][2 inputs].
template <bool kZeros>
inline void dequantise_tiles(const Int4Linear& p, int64_t panel, int64_t start, int64_t count, uint16_t* to) {
  const uint32_t* words = p.weight + (panel * p.linear.inputs + start) / kWordInputs * kPanel;
  for (int64_t k = 0; k < count;) {
    Group g;
    group_of(p, panel, (start + k) / p.group, &g);
    const F low_scale = simd::load(g.scales[0]), high_scale = simd::load(g.scales[1]);
    const F low_zero = kZeros ? simd::load(g.zeros[0]) : F{}, high_zero = kZeros ? simd::load(g.zeros[1]) : F{};
    const int64_t end = least(count, k + p.group - (start + k) % p.group);
    for (; k < end; k += kWordInputs, words += kPanel, to += kWordInputs * kPanel) {
      simd::U w;
      memcpy(&w, words, sizeof w);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const F low = weights_of<kZeros>(w, 2 * j, low_scale, low_zero), high = weights_of<kZeros>(w, 2 * j + 1, high_scale, high_zero);
        const auto both = _mm512_cvtne2ps_pbh(simd::bits<__m512>(high), simd::bits<__m512>(low));
        memcpy(to + j * 2 * kPanel, &both, 64);
      }
    }
  }
}

inline void tiled_item(const Int4Linear& p, const Item& item, const uint16_t* x, int64_t row, int64_t rows, int64_t block, float* sums, uint16_t* weights) {
  const int64_t steps = p.linear.inputs / kTileInputs;
  const int64_t part = rows > kPanel ? kStepsInL1 : kStepsInL1 / 2;
  const auto panels = [&](int first, int n, int64_t step, int64_t count, const char** b) {
    for (int i = 0; i < n; ++i) {
      uint16_t* to = weights + i * part * kTile / 2;
      if (p.zeros) dequantise_tiles<true>(p, item.panels[first + i], step * kTileInputs, count * kTileInputs, to);
      else dequantise_tiles<false>(p, item.panels[first + i], step * kTileInputs, count * kTileInputs, to);
      b[i] = reinterpret_cast<const char*>(to);
    }
  };
  const auto done = [&](int64_t r, int64_t n, const float* found) { finish(p.linear, item, found, item.count * kPanel, nullptr, row + r, n); };
  tile_item<true>(reinterpret_cast<const char*>(x), steps, rows, item.count, sums, block, part, panels, done);
}
#endif

// -- the whole ---------------------------------------------------------------------------------------------------------------------
// Row r of x in stored order, as floats.
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

// Row r of bfloat16 x in stored order, 32 inputs every kTile bytes.
inline void tile_row_of(const Int4Linear& p, const uint16_t* x, uint16_t* to) {
  for (int64_t k = 0; k < p.linear.inputs; k += 32, to += kPanel * 32) {
    if (!p.order) memcpy(to, x + k, 64);
    else
      for (int i = 0; i < 32; ++i) to[i] = x[p.order[k + i]];
  }
}

inline int int4_linear_level(const Int4Linear& p) {
  const Linear& l = p.linear;
  const bool tiles = CVMK_GEMM_TILES && l.x_dtype == kBfloat16;
  const bool gated = l.activation == kSwiglu;
  const int64_t columns = out_columns(l), wanted = tiles ? (2 << 20) / (2 * l.inputs) / 32 * 32 : kFloatRowsAtOnce;
  const int64_t round = least(up(l.rows, tiles ? 32 : 1), wanted < 32 ? 32 : wanted > 512 ? 512 : wanted);
  const int threads = l.rows * l.inputs * l.outputs <= (1 << 16) ? 1 : threads::limit();
  int width = !tiles ? 4 : l.rows > 32 ? 8 : l.rows > kPanel ? 2 : 4;
  while (width > 2 && up(columns, width * kPanel) / (width * kPanel) < 2 * threads) width /= 2;
  if (gated) width /= 2;

  const int64_t x_bytes = round * l.inputs * (tiles ? 2 : 4);
  const int64_t sums_each = round * (2 * width + 1) * kPanel * (tiles ? 1 : kHalves);
  const int64_t weight_bytes = tiles ? 32 << 10 : kPartInputs * kPanel * 4 * 2;
  Scratch scratch = scratch_of(x_bytes + threads * (up(sums_each, 16) * 4 + weight_bytes) + 64);
  if (!scratch.base) return 1;
  char* x = scratch.take<char>(x_bytes);
  float* all_sums = scratch.take<float>(threads * up(sums_each, 16));
  char* all_weights = scratch.take<char>(threads * weight_bytes);

  const int64_t items = up(columns, width * kPanel) / (width * kPanel);
  for (int64_t start = 0; start < l.rows; start += round) {
    const int64_t rows = least(round, l.rows - start);
    const auto copy_row = [&](int64_t r) {
      const char* from = static_cast<const char*>(l.x) + (start + r) * l.x_stride * element_bytes(l.x_dtype);
#if CVMK_GEMM_TILES
      if (tiles)
        return tile_row_of(p, reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(x) + r / kPanel * kPanel * l.inputs + r % kPanel * 32);
#endif
      float* to = reinterpret_cast<float*>(x) + r * l.inputs;
      if (l.x_dtype == kFloat32) float_row<kFloat32>(p, from, to);
      else if (l.x_dtype == kBfloat16) float_row<kBfloat16>(p, from, to);
      else float_row<kFloat16>(p, from, to);
    };
    int64_t shared = rows;
    if (rows * l.inputs <= 16384) {
      for (int64_t r = 0; r < rows; ++r) copy_row(r);
      shared = 0;
    }
    const auto enter = [&] {
#if CVMK_GEMM_TILES
      if (tiles) configure_tiles(rows);
#endif
    };
    const auto leave = [&] {
#if CVMK_GEMM_TILES
      if (tiles) _tile_release();
#endif
    };
    const auto one_item = [&](int64_t i, int thread) {
      const Item item = item_of(l, i * width * kPanel, width);
      float* sums = all_sums + thread * up(sums_each, 16);
      char* weights = all_weights + thread * weight_bytes;
#if CVMK_GEMM_TILES
      if (tiles) return tiled_item(p, item, reinterpret_cast<const uint16_t*>(x), start, rows, round, sums, reinterpret_cast<uint16_t*>(weights));
#endif
      float_item(p, item, reinterpret_cast<const float*>(x), start, rows, sums, reinterpret_cast<float*>(weights));
    };
    two_loops(threads, shared, copy_row, items, enter, one_item, leave);
  }
  free(scratch.base);
  return 0;
}

}  // namespace
