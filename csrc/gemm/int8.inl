// int8_linear: rows are quantised once a thread, multiplied exactly into int32, and finished while a tile of sums is hot.
#pragma once
#include "gemm/int8_rows.inl"
#include "gemm/int8_tiles.inl"
#include "gemm/int8_vectors.inl"

namespace cvmk::gemm {
namespace {

constexpr int64_t kRoundBytes = 1 << 19;   // quantised rows that stand in the second cache of a thread
constexpr int64_t kAlone = 1 << 18;        // below so many multiplications the calling thread does the work
constexpr int64_t kCachedWeight = 1 << 20;  // bytes of a weight that every thread can keep

// Units are rounds of rows times blocks of columns. A thread holds `each` bytes.
struct Int8Plan {
  bool tiles;
  int width, threads;
  int64_t padded, round, blocks, units, sums_each, inverses, each;
};

inline Int8Plan plan_int8(const Int8Linear& p, const Team& team) {
  const Linear& l = p.linear;
  Int8Plan plan{};
  if (l.rows == 0) return plan;
  plan.padded = up(l.inputs, kStep);
  plan.tiles = in_tiles(l.rows, p.vnni);
  const int limit = l.rows * l.inputs * l.outputs <= kAlone ? 1 : team.size;
  plan.width = l.activation == kSwiglu ? 2 : 4;
  const bool apart = plan.padded * l.outputs <= kCachedWeight || l.rows >= l.outputs;
  plan.round = rows_of_round(l.rows, kRoundBytes / plan.padded, apart ? limit : 1);
  plan.blocks = pieces(out_columns(l), plan.width * kPanel);
  plan.units = pieces(l.rows, plan.round) * plan.blocks;
  plan.threads = static_cast<int>(least(limit, plan.units));
  plan.sums_each = (plan.tiles ? kSumRows : kVectorRows) * kMostPanels * kPanel;
  plan.inverses = p.smooth_scale ? plan.padded : 0;
  plan.each = up((p.prepared == nullptr ? plan.round * plan.padded : 0) + (up(plan.round, 16) + plan.sums_each + plan.inverses) * 4, 4096) + 1024;
  return plan;
}

template <bool kVnni>
inline void int8_linear_as(const Int8Linear& p, const Int8Plan& plan, char* scratch, const Team& team) {
  const Linear& l = p.linear;
  const bool tiles = plan.tiles;
  const int width = plan.width;
  const int64_t padded = plan.padded, round = plan.round, blocks = plan.blocks;
  team.share(plan.threads, plan.units, [&](int64_t first, int64_t last, int thread) {
    Arena own{scratch + thread * plan.each};
    uint8_t* a = own.take<uint8_t>(p.prepared == nullptr ? round * padded : 0);
    float *row_scales = own.take<float>(up(round, 16)), *inverse = p.smooth_scale ? own.take<float>(plan.inverses) : nullptr;
    int32_t* sums = own.take<int32_t>(plan.sums_each);
    if (p.prepared == nullptr && inverse) invert(p, inverse, padded);
#if CVMK_GEMM_TILES
    if (tiles) configure_rows(l.rows);
#endif
    int64_t quantised = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / blocks * round, rows = least(round, l.rows - row);
      if (p.prepared == nullptr && row != quantised)
        for (int64_t r = 0; r < rows; ++r)
          row_scales[r] = quantise(p, inverse, row + r, kVnni && !tiles ? 0x80 : 0, byte_row(a, r, padded, tiles), tiles ? kPanel * kStep : kStep);
      quantised = row;
      const uint8_t* bytes = p.prepared == nullptr ? a : p.prepared->bytes + row * padded;
      const float* scales = p.prepared == nullptr ? row_scales : p.prepared->scales + row;
      const Item item = item_of(l, i % blocks * width * kPanel, width);
#if CVMK_GEMM_TILES
      if (tiles) {
        tile_item(p, item, bytes, padded / kStep, scales, row, rows, sums);
        continue;
      }
#endif
      vector_item<kVnni>(p, item, bytes, padded, scales, row, rows, sums);
    }
#if CVMK_GEMM_TILES
    if (tiles) _tile_release();
#endif
  });
}

int64_t int8_scratch(const Int8Linear& p, const Team& team) {
  const Int8Plan plan = plan_int8(p, team);
  return plan.threads * plan.each;
}

void run_int8(const Int8Linear& p, char* scratch, const Team& team) {
  const Int8Plan plan = plan_int8(p, team);
  if (plan.units == 0) return;
#if defined(__AVX512F__)
  if (p.vnni) return int8_linear_as<true>(p, plan, scratch, team);
#endif
  int8_linear_as<false>(p, plan, scratch, team);
}

}  // namespace
}  // namespace cvmk::gemm
