// What the kernels of the scan share: functions of a vector, transpositions, and tiles of 64 steps with one channel a lane.
//
// A tile is float [steps][kLanes]: row t holds the values of kLanes channels at step t. Tensors have time contiguous (or channels,
// which needs no transposition); rows of a tile that belong to no channel are 0.

#include <float.h>

#include "common/elements.h"
#include "scan/params.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace cvmk::scan {
namespace {

using simd::F;
using simd::H;
using simd::I;
constexpr int W = simd::kLanes;
constexpr float kLn2 = 0.693147180559945309f;

// Numbers below the smallest normal one (1.2e-38) count as 0 between these two: a state that decays over a stretch of zeros would otherwise
// cost a hundred times the cycles as soon as it is subnormal. (No destructor: it would refer to a weak symbol of the C++ runtime.)
CVMK_INLINE unsigned flush_subnormals() {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040u);
  return before;
#else
  return 0;
#endif
}
CVMK_INLINE void restore_subnormals(unsigned before) {
#if defined(__SSE2__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

// 2^v. At most 1 ulp of error (0.55 measured over all v of [-1, 1], where the decays of a scan are); NaN gives NaN, results below the smallest
// normal number are 0, those from 2^128 on infinite. v = n + r with n the nearest integer, so that r is exact and |r| <= 1/2; a polynomial
// 1 + r q(r) of degree 6, relative error 3.0e-9, whose linear coefficient is ln 2 itself: an error there would be the same in every decay near 1,
// and a long scan multiplies thousands of them; times 2^n by the exponent.
CVMK_INLINE F exp2(F v) {
#if defined(__AVX512F__)
  const F r = simd::bits<F>(_mm512_reduce_ps(simd::bits<__m512>(v), 0));  // 0 where v is infinite
  const F n = v - r;
#else
  const F low = simd::set(-126.0f), high = simd::set(128.0f);
  const F given = v;
  v = low > v ? low : v;  // NaN stays
  v = high < v ? high : v;
  const F n = simd::round(v);
  const F r = v - n;
#endif
  F p = simd::set(1.5326471475e-4f);
  p = p * r + 1.3390806270e-3f;
  p = p * r + 9.6185058355e-3f;
  p = p * r + 5.5503599346e-2f;
  p = p * r + 2.4022647738e-1f;
  p = p * r + kLn2;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return simd::bits<F>(_mm512_maskz_scalef_ps(0xFFFF, simd::bits<__m512>(p), simd::bits<__m512>(n)));
#else
  // p in [0.7, 1.42]: adding n to its exponent reaches infinity at n = 128 (there p is 1), and never the subnormal numbers.
  const F y = simd::bits<F>(simd::bits<I>(p) + (__builtin_convertvector(n, I) << 23));
  return given < low ? F{} : (given == given ? y : given);
#endif
}

// log2(e) x in one rounding where the level has FMA. Decays are 2^(rate A) with rate = log2(e) step: rounding the steps errs to both sides over
// time, while a rounded log2(e) A would err to one side at every step.
CVMK_INLINE F times_log2e(F x) { return x * 1.44269502162933350f + x * 1.92596299e-8f; }

// log(1 + e^v) and its derivative, v by itself above 20 (where they are the same number). With e = e^-|v|: softplus = max(v, 0) + log1p(e),
// log1p(e) = 2 artanh(e / (2 + e)) as an odd polynomial of degree 13 in an argument of at most 1/3 (truncation 2e-9).
CVMK_INLINE F sigmoid_of(F v, F e) {
  const F one = 1.0f / (1.0f + e);
  return v < 0.0f ? one * e : one;
}
CVMK_INLINE F sigmoid(F v) { return sigmoid_of(v, simd::exp(-simd::abs(v))); }
CVMK_INLINE F softplus_of(F v, F e) {
  const F s = e / (2.0f + e);
  const F q = s * s;
  F p = simd::set(1.0f / 15.0f);
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q * s + s;
  return (v > 0.0f ? v : F{}) + (p + p);
}
CVMK_INLINE F softplus(F v) { return softplus_of(v, simd::exp(-simd::abs(v))); }

// -- transpositions -------------------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
typedef __m512 V;
CVMK_INLINE V low2(V a, V b) { return _mm512_unpacklo_ps(a, b); }
CVMK_INLINE V high2(V a, V b) { return _mm512_unpackhi_ps(a, b); }
CVMK_INLINE V low4(V a, V b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
CVMK_INLINE V high4(V a, V b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
CVMK_INLINE V even(V a, V b) { return _mm512_shuffle_f32x4(a, b, 0x88); }
CVMK_INLINE V odd(V a, V b) { return _mm512_shuffle_f32x4(a, b, 0xDD); }
#elif defined(__AVX2__)
typedef __m256 V;
CVMK_INLINE V low2(V a, V b) { return _mm256_unpacklo_ps(a, b); }
CVMK_INLINE V high2(V a, V b) { return _mm256_unpackhi_ps(a, b); }
CVMK_INLINE V low4(V a, V b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); }
CVMK_INLINE V high4(V a, V b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); }
CVMK_INLINE V even(V a, V b) { return _mm256_permute2f128_ps(a, b, 0x20); }
CVMK_INLINE V odd(V a, V b) { return _mm256_permute2f128_ps(a, b, 0x31); }
#endif

// m[i][j] <-> m[j][i]
CVMK_INLINE void transpose(F* m) {
#if defined(__AVX2__)
  V r[W];
  for (int g = 0; g < W; g += 4) {
    const V a = simd::bits<V>(m[g]), b = simd::bits<V>(m[g + 1]), c = simd::bits<V>(m[g + 2]), d = simd::bits<V>(m[g + 3]);
    const V ab = low2(a, b), cd = low2(c, d), AB = high2(a, b), CD = high2(c, d);
    r[g] = low4(ab, cd);
    r[g + 1] = high4(ab, cd);
    r[g + 2] = low4(AB, CD);
    r[g + 3] = high4(AB, CD);
  }
  for (int k = 0; k < 4; ++k) {
#if defined(__AVX512F__)
    const V a = even(r[k], r[4 + k]), b = even(r[8 + k], r[12 + k]), c = odd(r[k], r[4 + k]), d = odd(r[8 + k], r[12 + k]);
    m[k] = simd::bits<F>(even(a, b));
    m[4 + k] = simd::bits<F>(even(c, d));
    m[8 + k] = simd::bits<F>(odd(a, b));
    m[12 + k] = simd::bits<F>(odd(c, d));
#else
    m[k] = simd::bits<F>(even(r[k], r[4 + k]));
    m[4 + k] = simd::bits<F>(odd(r[k], r[4 + k]));
#endif
  }
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = x;
    }
#endif
}

// Lane i of the result is the sum over the lanes of v[i].
CVMK_INLINE F row_sums(const F* v) {
#if defined(__AVX2__)
  V q[W / 4];
  for (int g = 0; g < W / 4; ++g) {
    const V a = simd::bits<V>(v[4 * g]), b = simd::bits<V>(v[4 * g + 1]), c = simd::bits<V>(v[4 * g + 2]), d = simd::bits<V>(v[4 * g + 3]);
    const V ab = low2(a, b) + high2(a, b), cd = low2(c, d) + high2(c, d);
    q[g] = low4(ab, cd) + high4(ab, cd);
  }
  const V p = even(q[0], q[1]) + odd(q[0], q[1]);
#if defined(__AVX512F__)
  const V s = even(q[2], q[3]) + odd(q[2], q[3]);
  return simd::bits<F>(even(p, s) + odd(p, s));
#else
  return simd::bits<F>(p);
#endif
#else
  F sums{};
  for (int i = 0; i < W; ++i) sums[i] = simd::sum(v[i]);
  return sums;
#endif
}

// A pointer to memory with rows and columns, without its type.
struct Plane {
  char* data;
  Dtype dtype;
  int64_t row, column;  // strides in elements
};
CVMK_INLINE Plane plane(const View& view, int64_t batch, int64_t row, int64_t column) {
  const int64_t offset = batch * view.batch + row * view.row + column * view.column;
  return {elements::at(view.data, view.dtype, offset), view.dtype, view.row, view.column};
}
CVMK_INLINE Plane plane(const float* data, int64_t row_stride) {
  return {reinterpret_cast<char*>(const_cast<float*>(data)), kFloat32, row_stride, 1};
}

// -- tiles ----------------------------------------------------------------------------------------------------------------------
template <Dtype kType>
inline __attribute__((noinline)) void load_tile_as(const Plane& from, int rows, int columns, bool flip, float* tile) {
  constexpr int64_t size = size_of(kType);
  for (int c = 0; c < columns; c += W) {
    const int n = columns - c < W ? columns - c : W;
    F m[W];
    if (from.row == 1 && columns == 1) {
      m[0] = rows == W ? elements::load<kType>(from.data) : elements::load_n<kType>(from.data, rows);
    } else if (from.column == 1) {
      const char* p = from.data + c * size;
      const int64_t stride = from.row * size;
      if (rows == W && n == W) {
        for (int r = 0; r < W; ++r) m[r] = elements::load<kType>(p + r * stride);
      } else {
        for (int r = 0; r < W; ++r) m[r] = r < rows ? elements::load_n<kType>(p + r * stride, n) : F{};
      }
      transpose(m);
    } else if (from.row == 1) {
      const char* p = from.data + c * from.column * size;
      const int64_t stride = from.column * size;
      if (rows == W) {
        for (int i = 0; i < n; ++i) m[i] = elements::load<kType>(p + i * stride);
      } else {
        for (int i = 0; i < n; ++i) m[i] = elements::load_n<kType>(p + i * stride, rows);
      }
    } else {
      for (int i = 0; i < W; ++i) {
        m[i] = F{};
        for (int r = 0; r < rows && i < n; ++r) m[i][r] = elements::load_one<kType>(from.data + (r * from.row + (c + i) * from.column) * size);
      }
    }
    for (int i = 0; i < n; ++i) simd::store(tile + (flip ? columns - 1 - c - i : c + i) * W, m[i]);
  }
}
CVMK_INLINE void load_tile(const Plane& from, int rows, int columns, bool flip, float* tile) {
  if (from.dtype == kFloat32) load_tile_as<kFloat32>(from, rows, columns, flip, tile);
  else if (from.dtype == kBFloat16) load_tile_as<kBFloat16>(from, rows, columns, flip, tile);
  else load_tile_as<kFloat16>(from, rows, columns, flip, tile);
}

// To memory whose columns or rows are contiguous.
template <Dtype kType>
inline __attribute__((noinline)) void store_tile_as(const Plane& to, int rows, int columns, bool flip, const float* tile) {
  constexpr int64_t size = size_of(kType);
  if (to.row == 1 && (columns == 1 || to.column != 1)) {  // channels that are neighbours
    const int64_t stride = to.column * size;
    for (int c = 0; c < columns; ++c) {
      const F v = simd::load(tile + (flip ? columns - 1 - c : c) * W);
      if (rows == W) elements::store<kType>(to.data + c * stride, v);
      else elements::store_n<kType>(to.data + c * stride, v, rows);
    }
    return;
  }
  for (int c = 0; c < columns; c += W) {
    const int n = columns - c < W ? columns - c : W;
    F m[W];
    for (int i = 0; i < W; ++i) m[i] = i < n ? simd::load(tile + (flip ? columns - 1 - c - i : c + i) * W) : F{};
    transpose(m);
    char* p = to.data + c * size;
    const int64_t stride = to.row * size;
    if (n == W) {
      for (int r = 0; r < rows; ++r) elements::store<kType>(p + r * stride, m[r]);
    } else {
      for (int r = 0; r < rows; ++r) elements::store_n<kType>(p + r * stride, m[r], n);
    }
  }
}
CVMK_INLINE void store_tile(const Plane& to, int rows, int columns, bool flip, const float* tile) {
  if (to.dtype == kFloat32) store_tile_as<kFloat32>(to, rows, columns, flip, tile);
  else if (to.dtype == kBFloat16) store_tile_as<kBFloat16>(to, rows, columns, flip, tile);
  else store_tile_as<kFloat16>(to, rows, columns, flip, tile);
}

// The rows [r, r + count), which are neighbours in memory, as `load_rows`.
template <Dtype kType>
CVMK_INLINE void turn_rows_as(const Plane& from, int64_t r, int count, int columns, bool flip, float* out, int64_t pitch) {
  constexpr int64_t size = size_of(kType);
  for (int c = 0; c < columns; c += W) {
    const int n = columns - c < W ? columns - c : W;
    F m[W];
    for (int i = 0; i < W; ++i) {
      const int64_t column = flip ? columns - 1 - c - i : c + i;
      m[i] = i < n ? elements::load_n<kType>(from.data + (r + column * from.column) * size, count) : F{};
    }
    transpose(m);
    for (int i = 0; i < count; ++i) simd::store_n(out + i * pitch + c, m[i], n);
  }
}

// Rows [rows][columns] of any dtype as float32, row r at out + r * pitch, the columns flipped or not.
template <Dtype kType>
inline __attribute__((noinline)) void load_rows_as(const Plane& from, int64_t rows, int columns, bool flip, float* out, int64_t pitch) {
  constexpr int64_t size = size_of(kType);
  if (from.row == 1 && from.column != 1 && columns > 1) {
    for (int64_t r = 0; r < rows; r += W) turn_rows_as<kType>(from, r, static_cast<int>(rows - r < W ? rows - r : W), columns, flip, out + r * pitch, pitch);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const char* p = from.data + r * from.row * size;
    float* q = out + r * pitch;
    if (columns == 1) {  // not by a masked store, for what follows reads it one by one
      *q = elements::load_one<kType>(p);
    } else if (from.column == 1 && !flip) {
      int c = 0;
      for (; c + W <= columns; c += W) simd::store(q + c, elements::load<kType>(p + c * size));
      if (c < columns) simd::store_n(q + c, elements::load_n<kType>(p + c * size, columns - c), columns - c);
    } else {
      for (int c = 0; c < columns; ++c) q[flip ? columns - 1 - c : c] = elements::load_one<kType>(p + c * from.column * size);
    }
  }
}
CVMK_INLINE void load_rows(const Plane& from, int64_t rows, int columns, bool flip, float* out, int64_t pitch) {
  if (from.dtype == kFloat32) load_rows_as<kFloat32>(from, rows, columns, flip, out, pitch);
  else if (from.dtype == kBFloat16) load_rows_as<kBFloat16>(from, rows, columns, flip, out, pitch);
  else load_rows_as<kFloat16>(from, rows, columns, flip, out, pitch);
}

CVMK_INLINE void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

}  // namespace
}  // namespace cvmk::scan
