// 4-bit weights times rows of quantised bytes: exact sums of a group in int32, scaled and added in float32 in the order of the groups.
#pragma once
#include "gemm/int8_rows.inl"
#include "gemm/int8_vectors.inl"

namespace cvmk::gemm {
namespace {

constexpr int64_t kBytesRows = 24;     // rows of a round
constexpr int64_t kBytesPanels = 2;    // of a block
constexpr int64_t kBytesAlone = 1 << 18;  // below so many multiplications the calling thread does the work
#if defined(__AVX512F__)
constexpr int kBytesBlock = 4;
#else
constexpr int kBytesBlock = 1;
#endif

template <bool kVnni>
CVMK_INLINE I nibble_dot(I sum, I x, I w) {
  return kVnni ? dot4<true>(sum, w, x) : dot4<false>(sum, x, w);
}

// out [rows][stride] = the sums of kRows rows with kPanels panels, without the rows' scales. `row_sums` [rows][groups] of the bytes of each group.
template <bool kVnni, int kRows, int kPanels>
inline void bytes_block(const Int4Bytes& p, const uint8_t* a, int64_t padded, const int32_t* row_sums, const int64_t* panels, float* out, int64_t stride) {
  const int64_t inputs = p.linear.inputs, groups = inputs / p.group, steps = inputs / 8;
  const uint8_t* w[kPanels];
  const float* scales[kPanels];
  for (int c = 0; c < kPanels; ++c) {
    w[c] = p.weight + panels[c] * steps * kStep;
    scales[c] = p.linear.scales + panels[c] * groups * kPanel;
  }
  F total[kRows][kPanels * kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    I sum[kRows][kPanels * kVectors] = {};
    for (int64_t k = g * p.group; k < (g + 1) * p.group; k += 8) {
      I low[kPanels * kVectors], high[kPanels * kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kPanels * kVectors; ++c) {
        I both;
        memcpy(&both, w[c / kVectors] + k / 8 * kStep + c % kVectors * kLanes * 4, sizeof both);
        low[c] = both & 0x0F0F0F0F;
        high[c] = simd::bits<I>(simd::bits<simd::U>(both) >> 4) & 0x0F0F0F0F;
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t first, second;
        memcpy(&first, a + r * padded + k, 4);
        memcpy(&second, a + r * padded + k + 4, 4);
        const I x = simd::seti(first), y = simd::seti(second);
#pragma GCC unroll 8
        for (int c = 0; c < kPanels * kVectors; ++c) sum[r][c] = nibble_dot<kVnni>(nibble_dot<kVnni>(sum[r][c], x, low[c]), y, high[c]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kPanels * kVectors; ++c)
        total[r][c] += __builtin_convertvector(sum[r][c] - 8 * row_sums[r * groups + g], F) * simd::load(scales[c / kVectors] + g * kPanel + c % kVectors * kLanes);
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kPanels * kVectors; ++c) simd::store(out + r * stride + c * kLanes, total[r][c]);
}

template <bool kVnni>
inline void bytes_item(const Int4Bytes& p, const Item& item, const uint8_t* a, int64_t padded, const int32_t* row_sums, const float* row_scales, int64_t row,
                       int64_t rows, float* sums) {
  const int64_t stride = item.count * kPanel, groups = p.linear.inputs / p.group;
  for (int done = 0; done < item.count;) {
    const bool two = item.count - done >= kBytesPanels;
    for (int64_t r = 0; r < rows;) {
      const uint8_t* from = a + r * padded;
      const int32_t* own = row_sums + r * groups;
      float* to = sums + r * stride + done * kPanel;
      const bool many = rows - r >= kBytesBlock;
      if (two && many) bytes_block<kVnni, kBytesBlock, kBytesPanels>(p, from, padded, own, item.panels + done, to, stride);
      else if (two) bytes_block<kVnni, 1, kBytesPanels>(p, from, padded, own, item.panels + done, to, stride);
      else if (many) bytes_block<kVnni, kBytesBlock, 1>(p, from, padded, own, item.panels + done, to, stride);
      else bytes_block<kVnni, 1, 1>(p, from, padded, own, item.panels + done, to, stride);
      r += many ? kBytesBlock : 1;
    }
    done += two ? static_cast<int>(kBytesPanels) : 1;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < stride; i += kLanes) simd::store(sums + r * stride + i, simd::load(sums + r * stride + i) * row_scales[r]);
  finish(p.linear, item, static_cast<const float*>(sums), stride, nullptr, row, rows);
}

// A row as signed bytes, and their sums in each group. Returns its scale.
inline float quantise_groups(const float* x, int64_t inputs, int64_t group, uint8_t* to, int32_t* sums) {
  const float scale = quantise_row<kFloat32>(x, nullptr, inputs, 0, to, kStep);
  for (int64_t g = 0; g < inputs / group; ++g) {
    int32_t sum = 0;
    for (int64_t k = g * group; k < (g + 1) * group; ++k) sum += static_cast<int8_t>(to[k]);
    sums[g] = sum;
  }
  return scale;
}

struct BytesPlan {
  int width, threads;
  int64_t padded, round, items, sums_each;
  uint8_t* rows;
  float *scales, *sums;
  int32_t* row_sums;

  BytesPlan(const Int4Bytes& p, const Team& team, Arena* arena) {
    const Linear& l = p.linear;
    width = l.activation == kSwiglu ? 2 : 4;
    padded = up(l.inputs, kStep);
    round = least(l.rows, kBytesRows);
    items = pieces(out_columns(l), width * kPanel);
    threads = static_cast<int>(least(l.rows * l.inputs * l.outputs <= kBytesAlone ? 1 : team.size, items));
    sums_each = up(round * kMostPanels * kPanel, 16);
    rows = arena->take<uint8_t>(round * padded);
    scales = arena->take<float>(round);
    row_sums = arena->take<int32_t>(round * (l.inputs / p.group));
    sums = arena->take<float>(threads * sums_each);
  }
};

int64_t bytes_scratch(const Int4Bytes& p, const Team& team) {
  Arena count;
  if (p.linear.rows > 0) BytesPlan(p, team, &count);
  return count.used;
}

template <bool kVnni>
inline void bytes_as(const Int4Bytes& p, char* scratch, const Team& team) {
  const Linear& l = p.linear;
  Arena arena{scratch};
  const BytesPlan plan(p, team, &arena);
  const int64_t groups = l.inputs / p.group;
  for (int64_t start = 0; start < l.rows; start += plan.round) {
    const int64_t rows = least(plan.round, l.rows - start);
    for (int64_t r = 0; p.prepared == nullptr && r < rows; ++r)
      plan.scales[r] = quantise_groups(static_cast<const float*>(l.x) + (start + r) * l.x_stride, l.inputs, p.group, plan.rows + r * plan.padded, plan.row_sums + r * groups);
    const uint8_t* bytes = p.prepared == nullptr ? plan.rows : p.prepared->bytes + start * plan.padded;
    const int32_t* row_sums = p.prepared == nullptr ? plan.row_sums : p.prepared->sums + start * groups;
    const float* scales = p.prepared == nullptr ? plan.scales : p.prepared->scales + start;
    team.share(plan.threads, plan.items, [&](int64_t first, int64_t last, int thread) {
      for (int64_t i = first; i < last; ++i)
        bytes_item<kVnni>(p, item_of(l, i * plan.width * kPanel, plan.width), bytes, plan.padded, row_sums, scales, start, rows, plan.sums + thread * plan.sums_each);
    });
  }
}

void run_bytes(const Int4Bytes& p, char* scratch, const Team& team) {
  if (p.linear.rows == 0) return;
#if defined(__AVX512F__)
  if (p.vnni) return bytes_as<true>(p, scratch, team);
#endif
  bytes_as<false>(p, scratch, team);
}

}  // namespace
}  // namespace cvmk::gemm
