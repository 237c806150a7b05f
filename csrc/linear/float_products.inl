// Products in float32 on vector registers, of operands of any type.
//
// A right operand lies in panels of kPanel columns, [panel][depth][kPanel]. A left operand lies in rows, or across: [panel][depth][kAcross].
#pragma once
#include "common/amx.h"
#include "common/float_product.inl"
#include "linear/shape.inl"

namespace cvmk::linear {
namespace {

struct FloatProducts {
  typedef float Element;
  static constexpr int64_t kPanel = product::kPanel, kPart = 128;
  static_assert(kGroup % kPanel == 0, "groups are whole panels");

  CVMK_INLINE static void begin() {}
  CVMK_INLINE static void end() {}
  CVMK_INLINE static int64_t depth(int64_t n) { return n; }
  CVMK_INLINE static bool reads_in_place(const Matrix& m, int64_t, int64_t) {
    return m.dtype == kFloat32 && (m.rounds_to == kFloat32 || m.rounds_to == m.dtype);
  }
  CVMK_INLINE static void put(float* to, F x) { simd::store(to, x); }

  // A row of a left operand, zeros up to `padded`.
  CVMK_INLINE static void copy_row(const Matrix& m, const void* from, int64_t width, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += kLanes) simd::store(to + i, load(m, from, i, width));
  }

  // kAcross rows become columns `column` and following of a right operand.
  static void turn(const Matrix& m, const void* const* rows, int64_t width, float* to, int64_t depth, int64_t column) {
    for (int64_t first = 0; first < kAcross; first += kLanes) {
      float* place = to + (column + first) / kPanel * kPanel * depth + (column + first) % kPanel;
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t count = least(kLanes, width - i);
#if defined(__AVX512F__)
        __m512i x[16];
        for (int r = 0; r < 16; ++r) x[r] = simd::bits<__m512i>(load(m, rows[first + r], i, width));
        transpose16(x);
        for (int64_t k = 0; k < count; ++k) _mm512_storeu_si512(place + (i + k) * kPanel, x[k]);
#else
        for (int r = 0; r < kLanes; ++r) {
          const F x = load(m, rows[first + r], i, width);
          for (int64_t k = 0; k < count; ++k) place[(i + k) * kPanel + r] = x[k];
        }
#endif
      }
    }
  }

  // Two rows become the elements s and s + 1 of the sum of an operand in panels of kWidth; the second may be behind the depth.
  template <int64_t kWidth>
  static void lay(const Matrix& m, const void* const* rows, int64_t width, int64_t padded, float* to, int64_t depth, int64_t s) {
    for (int64_t r = 0; r < 2 && s + r < depth; ++r)
      for (int64_t i = 0; i < padded; i += kLanes) simd::store(to + i / kWidth * kWidth * depth + (s + r) * kWidth + i % kWidth, load(m, rows[r], i, width));
  }
  static void lay_right(const Matrix& m, const void* const* rows, int64_t width, int64_t padded, float* to, int64_t depth, int64_t s) {
    lay<kPanel>(m, rows, width, padded, to, depth, s);
  }
  static void lay_left(const float* const* rows, int64_t padded, float* to, int64_t depth, int64_t s) {
    const void* const from[2] = {rows[0], rows[1]};
    lay<kAcross>({nullptr, 0, kFloat32, kFloat32}, from, padded, padded, to, depth, s);
  }
  CVMK_INLINE static void turn_left(float*, int64_t, int64_t, int64_t, int64_t) {}

  // c [rows][kGroup] (+)= a left operand in rows, or across, times a group of a right one, whose panels have room for a depth of `room`.
  static void multiply_rows(int64_t rows, int64_t depth, const float* left, int64_t stride, const float* right, float* c) {
    if (depth == 0) memset(c, 0, static_cast<size_t>(rows * kGroup) * sizeof(float));
    product::multiply_parts(rows, kGroup, depth, kPart, {left, stride, 1, depth, 0}, {right, kPanel * depth, kPanel}, c, kGroup, false);
  }
  static void multiply_across(int64_t depth, int64_t room, const float* left, const float* right, float* c, bool add) {
    product::multiply_parts(kAcross, kGroup, depth, kPart, {left, 1, kAcross, depth, 0}, {right, kPanel * room, kPanel}, c, kGroup, add);
  }
};

}  // namespace
}  // namespace cvmk::linear
