// Products of quantised rows on AMX tiles: up to 32 rows times two or four panels.
//
// Rows are kept as [rows / 16][steps][16][64 bytes], a panel of the weight as [steps][16][64 bytes]: both sides of a step are 1 KiB tiles.
// Tiles 0 ... 3 hold sums, the others operands.
#pragma once
#include "gemm/int8_rows.inl"
#include "gemm/tiles.inl"

#if CVMK_GEMM_TILES

namespace cvmk::gemm {
namespace {

constexpr int64_t kStepsInL1 = 8;    // of two panels: 16 KiB stay in the first cache while the rows pass
constexpr int64_t kFetched = 1 << 20;  // bytes of a weight above which panels are fetched ahead

// Tiles of `rows` rows for A (4) and the sums where only one tile of rows is in use; else 16 everywhere.
inline void configure_rows(int64_t rows) {
  TileConfig c = kWholeTiles;
  if (rows < kPanel)
    for (int i = 0; i <= 4; ++i) c.rows[i] = static_cast<uint8_t>(rows);
  configure_tiles(c);
}

CVMK_INLINE void fetch_tile(const char* at) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; i += kStep) _mm_prefetch(at + 4 * kTile + i, _MM_HINT_T0);
}

// One tile of rows times one, two or four panels; kFetch where the panels may still be in memory.
template <int kPanels, bool kFetch>
inline void tile_row(const char* a, const char* const* b, int64_t steps, int32_t* sums, int64_t bytes, bool first) {
  static_assert(kPanels == 1 || kPanels == 2 || kPanels == 4, "");
  char* c = reinterpret_cast<char*>(sums);
  if (first) {
    _tile_zero(0);
    if constexpr (kPanels > 1) _tile_zero(1);
    if constexpr (kPanels > 2) _tile_zero(2);
    if constexpr (kPanels > 2) _tile_zero(3);
  } else {
    _tile_loadd(0, c, bytes);
    if constexpr (kPanels > 1) _tile_loadd(1, c + 64, bytes);
    if constexpr (kPanels > 2) _tile_loadd(2, c + 128, bytes);
    if constexpr (kPanels > 2) _tile_loadd(3, c + 192, bytes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = s * kTile;
    if (kFetch)
      for (int i = 0; i < kPanels; ++i) fetch_tile(b[i] + at);
    _tile_loadd(4, a + at, kStep);
    _tile_loadd(5, b[0] + at, kStep);
    _tile_dpbssd(0, 4, 5);
    if constexpr (kPanels > 1) {
      _tile_loadd(6, b[1] + at, kStep);
      _tile_dpbssd(1, 4, 6);
    }
    if constexpr (kPanels > 2) {
      _tile_loadd(7, b[2] + at, kStep);
      _tile_dpbssd(2, 4, 7);
      _tile_loadd(5, b[3] + at, kStep);
      _tile_dpbssd(3, 4, 5);
    }
  }
  _tile_stored(0, c, bytes);
  if constexpr (kPanels > 1) _tile_stored(1, c + 64, bytes);
  if constexpr (kPanels > 2) _tile_stored(2, c + 128, bytes);
  if constexpr (kPanels > 2) _tile_stored(3, c + 192, bytes);
}

// Two tiles of rows, the second `a_next` bytes behind the first, times one or two panels.
template <int kPanels, bool kFetch>
inline void tile_rows(const char* a, int64_t a_next, const char* const* b, int64_t steps, int32_t* sums, int64_t bytes, bool first) {
  static_assert(kPanels == 1 || kPanels == 2, "");
  char *c = reinterpret_cast<char*>(sums), *d = c + kPanel * bytes;
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kPanels > 1) _tile_zero(1);
    if constexpr (kPanels > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, bytes);
    _tile_loadd(2, d, bytes);
    if constexpr (kPanels > 1) _tile_loadd(1, c + 64, bytes);
    if constexpr (kPanels > 1) _tile_loadd(3, d + 64, bytes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = s * kTile;
    if (kFetch)
      for (int i = 0; i < kPanels; ++i) fetch_tile(b[i] + at);
    _tile_loadd(6, b[0] + at, kStep);
    _tile_loadd(4, a + at, kStep);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, a + a_next + at, kStep);
    _tile_dpbssd(2, 5, 6);
    if constexpr (kPanels > 1) {
      _tile_loadd(7, b[1] + at, kStep);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(2, d, bytes);
  if constexpr (kPanels > 1) _tile_stored(1, c + 64, bytes);
  if constexpr (kPanels > 1) _tile_stored(3, d + 64, bytes);
}

// `tiles` (1 or 2) tiles of rows times `count` panels: sums [16 * tiles][bytes / 4], added to what is there unless `first`.
template <bool kFetch>
inline void tile_block(const char* a, int64_t a_next, int64_t tiles, const char* const* b, int count, int64_t steps, int32_t* sums, int64_t bytes, bool first) {
  int done = 0;
  if (tiles == 1) {
    for (; done + 4 <= count; done += 4) tile_row<4, kFetch>(a, b + done, steps, sums + done * kPanel, bytes, first);
    for (; done + 2 <= count; done += 2) tile_row<2, kFetch>(a, b + done, steps, sums + done * kPanel, bytes, first);
    if (done < count) tile_row<1, kFetch>(a, b + done, steps, sums + done * kPanel, bytes, first);
  } else {
    for (; done + 2 <= count; done += 2) tile_rows<2, kFetch>(a, a_next, b + done, steps, sums + done * kPanel, bytes, first);
    if (done < count) tile_rows<1, kFetch>(a, a_next, b + done, steps, sums + done * kPanel, bytes, first);
  }
}

// All rows of a round times an item's panels: all inputs at once where they are few, or the rows; else a part of the inputs that the first
// cache holds passes over a block of rows. `sums` has room for [kSumRows][count * 16].
inline void tile_item(const Int8Linear& p, const Item& item, const uint8_t* a, int64_t steps, const float* scales, int64_t row, int64_t rows, int32_t* sums) {
  const int64_t stride = item.count * kPanel, next = steps * kTile;
  const bool whole = rows <= kBand || steps <= kStepsInL1, fetch = next * p.linear.outputs / kPanel > kFetched;
  const int64_t block = whole ? kBand : kSumRows, part = whole ? steps : kStepsInL1;
  const int group = rows > kPanel ? 2 : 4;
  for (int64_t m = 0; m < rows; m += block) {
    const int64_t end = least(rows, m + block);
    for (int64_t s = 0; s < steps; s += part) {
      const int64_t width = least(part, steps - s);
      const char* b[kMostPanels];
      for (int i = 0; i < item.count; ++i) b[i] = reinterpret_cast<const char*>(p.weight) + item.panels[i] * next + s * kTile;
      for (int g = 0; g < item.count; g += group) {
        const int count = item.count - g < group ? item.count - g : group;
        const bool last = s + width == steps && g + count == item.count;
        for (int64_t r = m; r < end; r += kBand) {
          const int64_t n = least(kBand, end - r), tiles = n > kPanel ? 2 : 1;
          const char* from = reinterpret_cast<const char*>(a) + r / kPanel * next + s * kTile;
          int32_t* to = sums + (r - m) * stride;
          if (last) expect(p.linear, item, row + r, n);
          if (fetch && r == 0) tile_block<true>(from, next, tiles, b + g, count, width, to + g * kPanel, stride * 4, s == 0);
          else tile_block<false>(from, next, tiles, b + g, count, width, to + g * kPanel, stride * 4, s == 0);
          if (last) finish(p.linear, item, static_cast<const int32_t*>(to), stride, scales + r, row + r, n);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cvmk::gemm

#endif
