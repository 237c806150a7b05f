// Products on AMX tiles: up to 32 rows of A times two or four panels of B, in int8 (64 inputs a step) or bfloat16 (32 inputs a step).
#pragma once
//
// A is kept as [rows / 16][steps][16][64 bytes], a panel of B as [steps][16][64 bytes]: both sides of a step are 1 KiB tiles. Tiles 0 ... 3
// hold sums, the others operands.
#if CVMK_GEMM_TILES

namespace {

constexpr int64_t kTile = kPanel * kStep;
constexpr int64_t kStepsInL1 = 8;  // of two panels: 32 KiB of B stay in the first cache while the rows pass

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// Tiles of `rows` rows for A (4, 5) and the sums where only one tile of rows is in use; else 16 everywhere.
inline void configure_tiles(int64_t rows) {
  TileConfig c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; ++i) {
    c.bytes_per_row[i] = 64;
    c.rows[i] = static_cast<uint8_t>(i <= 4 && rows < kPanel ? rows : kPanel);
  }
  _tile_loadconfig(&c);
}

#define CVMK_DOT(sum, a, b)        \
  do {                             \
    if constexpr (kBf16)           \
      _tile_dpbf16ps(sum, a, b);   \
    else                           \
      _tile_dpbssd(sum, a, b);     \
  } while (0)

// One tile of rows times one, two or four panels.
template <bool kBf16, int kPanels>
inline void tile_row(const char* a, const char* const* b, int64_t steps, void* sums, int64_t bytes, bool first) {
  static_assert(kPanels == 1 || kPanels == 2 || kPanels == 4, "");
  char* c = static_cast<char*>(sums);
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
    _tile_loadd(4, a + at, kStep);
    _tile_loadd(5, b[0] + at, kStep);
    CVMK_DOT(0, 4, 5);
    if constexpr (kPanels > 1) {
      _tile_loadd(6, b[1] + at, kStep);
      CVMK_DOT(1, 4, 6);
    }
    if constexpr (kPanels > 2) {
      _tile_loadd(7, b[2] + at, kStep);
      CVMK_DOT(2, 4, 7);
      _tile_loadd(5, b[3] + at, kStep);
      CVMK_DOT(3, 4, 5);
    }
  }
  _tile_stored(0, c, bytes);
  if constexpr (kPanels > 1) _tile_stored(1, c + 64, bytes);
  if constexpr (kPanels > 2) _tile_stored(2, c + 128, bytes);
  if constexpr (kPanels > 2) _tile_stored(3, c + 192, bytes);
}

// Two tiles of rows, the second `a_next` bytes behind the first, times one or two panels.
template <bool kBf16, int kPanels>
inline void tile_rows(const char* a, int64_t a_next, const char* const* b, int64_t steps, void* sums, int64_t bytes, bool first) {
  static_assert(kPanels == 1 || kPanels == 2, "");
  char *c = static_cast<char*>(sums), *d = c + kPanel * bytes;
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
    _tile_loadd(6, b[0] + at, kStep);
    _tile_loadd(4, a + at, kStep);
    CVMK_DOT(0, 4, 6);
    _tile_loadd(5, a + a_next + at, kStep);
    CVMK_DOT(2, 5, 6);
    if constexpr (kPanels > 1) {
      _tile_loadd(7, b[1] + at, kStep);
      CVMK_DOT(1, 4, 7);
      CVMK_DOT(3, 5, 7);
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(2, d, bytes);
  if constexpr (kPanels > 1) _tile_stored(1, c + 64, bytes);
  if constexpr (kPanels > 1) _tile_stored(3, d + 64, bytes);
}

#undef CVMK_DOT

// `tiles` (1 or 2) tiles of rows times `count` panels: sums [16 * tiles][bytes / 4], added to what is there unless `first`.
template <bool kBf16>
inline void tile_block(const char* a, int64_t a_next, int tiles, const char* const* b, int count, int64_t steps, void* sums, int64_t bytes, bool first) {
  char* c = static_cast<char*>(sums);
  int done = 0;
  if (tiles == 1) {
    for (; done + 4 <= count; done += 4) tile_row<kBf16, 4>(a, b + done, steps, c + done * 64, bytes, first);
    for (; done + 2 <= count; done += 2) tile_row<kBf16, 2>(a, b + done, steps, c + done * 64, bytes, first);
    if (done < count) tile_row<kBf16, 1>(a, b + done, steps, c + done * 64, bytes, first);
  } else {
    for (; done + 2 <= count; done += 2) tile_rows<kBf16, 2>(a, a_next, b + done, steps, c + done * 64, bytes, first);
    if (done < count) tile_rows<kBf16, 1>(a, a_next, b + done, steps, c + done * 64, bytes, first);
  }
}

// All rows of A times `count` panels. panels(first, n, step, steps, b) sets b[0 ... n) to the tiles of panels first ... at that step, for as
// many steps; it is called once for every `part` of the steps and `block` of rows. before(r, n) is called before the last products of rows
// r ... r + n, done(r, n, sums) gets their sums as [n][count * 16]. `sums` has room for `block` rows (a multiple of 32).
template <bool kBf16, typename Sum, typename Panels, typename Before, typename Done>
inline void tile_item(const char* a, int64_t steps, int64_t rows, int count, Sum* sums, int64_t block, int64_t part, const Panels& panels,
                      const Before& before, const Done& done) {
  const int64_t stride = count * kPanel, a_next = steps * kTile;
  const int group = rows > kPanel ? 2 : 4;
  for (int64_t m = 0; m < rows; m += block) {
    const int64_t end = least(rows, m + block);
    for (int64_t s = 0; s < steps; s += part) {
      const int64_t n = least(part, steps - s);
      for (int g = 0; g < count; g += group) {
        const int width = count - g < group ? count - g : group;
        const char* b[4];
        panels(g, width, s, n, b);
        for (int64_t r = m; r < end; r += 32) {
          Sum* to = sums + (r - m) * stride;
          const char* from = a + r / kPanel * a_next + s * kTile;
          const bool last = s + n == steps && g + width == count;
          if (last) before(r, least(32, end - r));
          tile_block<kBf16>(from, a_next, end - r > kPanel ? 2 : 1, b, width, n, to + g * kPanel, stride * 4, s == 0);
          if (last) done(r, least(32, end - r), to);
        }
      }
    }
  }
}

}  // namespace

#endif
