// Vectors of doubles, half as many lanes as there are of floats, for the rows that float32 has no digits for.
#pragma once
#include "attention/math.inl"

namespace cvmk::attention {
namespace {

constexpr int kWideLanes = kLanes / 2;
typedef double D __attribute__((vector_size(kWideLanes * 8)));
typedef int64_t L __attribute__((vector_size(kWideLanes * 8)));
typedef float Narrow __attribute__((vector_size(kWideLanes * 4)));

CVMK_INLINE D wide_set(double x) { return x - D{}; }
CVMK_INLINE D wide_load(const double* p) {
  D v;
  memcpy(&v, p, sizeof v);
  return v;
}
CVMK_INLINE void wide_store(double* p, D v) { memcpy(p, &v, sizeof v); }
CVMK_INLINE D widened(const float* p) {
  Narrow v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, D);
}
CVMK_INLINE void narrowed(float* p, D v) {
  const Narrow x = __builtin_convertvector(v, Narrow);
  memcpy(p, &x, sizeof x);
}

CVMK_INLINE double wide_sum(D v) {
  double sum = 0.0;
  for (int i = 0; i < kWideLanes; ++i) sum += v[i];
  return sum;
}

// exp(x) for x <= 700: 0 below -708, NaN stays NaN, exp(0) is exactly 1. x = n ln 2 + r with |r| <= ln(2) / 2 (Cody & Waite 1980), the series of
// exp(r) up to r^12, whose rest is 2e-16, times 2^n.
CVMK_INLINE D wide_exp(D x) {
  const D clamped = x > -708.0 ? x : wide_set(-708.0);
  // 1.5 * 2^52 + 1023: the low bits of the sum are the nearest integer plus the bias of the exponent.
  const D magic = wide_set(6755399441056767.0);
  const D shifted = clamped * 1.4426950408889634 + magic;
  const D n = shifted - magic;
  const D r = (clamped - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  D p = wide_set(1.0 / 479001600.0);
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  D y = p * simd::bits<D>(simd::bits<L>(shifted) << 52);
  y = x < -708.0 ? D{} : y;
  return x == x ? y : x;
}

CVMK_INLINE double wide_exp(double x) { return wide_exp(wide_set(x))[0]; }

// tanh, absolute error about 1e-16; relative to x where x is small.
CVMK_INLINE D wide_tanh(D x) {
  const D a = x < 0.0 ? -x : x;
  const D far = a > 20.0 ? wide_set(20.0) : a;
  const D big = 1.0 - 2.0 / (wide_exp(far + far) + 1.0);
  const D z = x * x;
  const D small = a * (1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 + z * (-17.0 / 315.0))));
  const D y = a < 0.01 ? small : big;
  return x == x ? (x < 0.0 ? -y : y) : x;
}

// to[0, n) = a row of numbers of any dtype, then zeros up to `padded`, a multiple of kWideLanes.
inline void to_wide(double* to, const char* from, Dtype dtype, int64_t n, int64_t padded) {
  int64_t i = 0;
  if (dtype == kFloat64) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(double));
    i = n;
  }
  for (; i < n; i += kLanes) {
    float x[kLanes];
    const int count = static_cast<int>(least(kLanes, n - i));
    simd::store(x, elements::load_n(from, dtype, i, count));
    if (count == kLanes) {
      wide_store(to + i, widened(x));
      wide_store(to + i + kWideLanes, widened(x + kWideLanes));
    } else {
      for (int lane = 0; lane < count; ++lane) to[i + lane] = static_cast<double>(x[lane]);
    }
  }
  for (i = n; i < padded; ++i) to[i] = 0.0;
}

// -- products -------------------------------------------------------------------------------------------------------------------------
// c[R][C vectors] (+)= a b, element (r, k) of a at a[r * am + k * ak]; summed in order of k from 0 and then added.
template <int R, int C>
__attribute__((noinline, unused)) void wide_micro(int64_t depth, const double* a, int64_t am, int64_t ak, const double* b, int64_t ldb, double* c, int64_t ldc,
                                                  bool add) {
  D sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sum[r][j] = D{};
  for (int64_t k = 0; k < depth; ++k) {
    D right[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) right[j] = wide_load(b + k * ldb + j * kWideLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const D left = wide_set(a[r * am + k * ak]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sum[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      double* to = c + r * ldc + j * kWideLanes;
      wide_store(to, add ? wide_load(to) + sum[r][j] : sum[r][j]);
    }
}

// c[m][n] (+)= a b over `depth`; n is a multiple of kWideLanes. An element's sum does not depend on m and n.
inline void wide_multiply(int64_t m, int64_t n, int64_t depth, const double* a, int64_t am, int64_t ak, const double* b, int64_t ldb, double* c, int64_t ldc,
                          bool add) {
  constexpr int kRows = 4, kColumns = 2;
  for (int64_t j = 0; j < n;) {
    const bool wide = j + kColumns * kWideLanes <= n;
    for (int64_t i = 0; i < m;) {
      const bool tall = i + kRows <= m;
      const double* left = a + i * am;
      double* to = c + i * ldc + j;
      if (wide)
        (tall ? wide_micro<kRows, kColumns> : wide_micro<1, kColumns>)(depth, left, am, ak, b + j, ldb, to, ldc, add);
      else
        (tall ? wide_micro<kRows, 1> : wide_micro<1, 1>)(depth, left, am, ak, b + j, ldb, to, ldc, add);
      i += tall ? kRows : 1;
    }
    j += wide ? kColumns * kWideLanes : kWideLanes;
  }
}

}  // namespace
}  // namespace cvmk::attention
