// One query a head over many keys: keys and values are read once, where they are, so nothing is packed. Sums are in float32.
// Numbers are taken two vectors at a time. Two vectors of bfloat16 are one load, from which a shift and a mask make the even and the odd
// ones; queries and results are kept in that order.
#pragma once
#include "attention/softmax.inl"

namespace cvmk::attention {
namespace {

constexpr int64_t kDirectRows = 16;
constexpr int64_t kPair = 2 * kLanes;
constexpr int64_t kAhead = 32;  // rows fetched ahead of their use; an address behind the end is no fault

// A matter of the sequence alone, so that its bits do not depend on the batch.
inline bool is_single_query(const Params& p, const Segment& g) {
  return g.rows == 1 && g.visible >= 128 && p.heads / p.kv_heads <= kDirectRows && p.teacher.heads == 0;
}

template <Dtype kDtype>
CVMK_INLINE void load_pair(const char* row, int64_t i, F* x, F* y) {
  if (kDtype == kBFloat16) {
    U both;
    memcpy(&both, row + i * 2, sizeof both);
    *x = simd::bits<F>(both << 16);
    *y = simd::bits<F>(both & 0xFFFF0000u);
  } else {
    *x = elements::load(row, kDtype, i);
    *y = elements::load(row, kDtype, i + kLanes);
  }
}

// A row of n numbers as floats, whole pairs of vectors in the order of load_pair; zeros behind.
template <Dtype kDtype>
void direct_row(float* dst, const char* row, int64_t n) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    F x, y;
    load_pair<kDtype>(row, i, &x, &y);
    simd::store(dst + i, x);
    simd::store(dst + i + kLanes, y);
  }
  elements::to_floats(dst + i, row + i * size_of(kDtype), kDtype, n - i, up(n - i, kLanes));
}

// The inverse, times a factor.
inline void from_direct_row(void* dst, Dtype dtype, const float* src, float factor, int64_t n) {
  const int64_t whole = dtype == kBFloat16 ? n / kPair * kPair : 0;
  char* to = static_cast<char*>(dst);
  for (int64_t i = 0; i < whole; i += kPair) {
    const U x = __builtin_convertvector(elements::round_bf16(simd::load(src + i) * factor), U), y = __builtin_convertvector(elements::round_bf16(simd::load(src + i + kLanes) * factor), U);
    const U both = x | (y << 16);
    memcpy(to + i * 2, &both, sizeof both);
  }
  elements::from_floats(to + whole * size_of(dtype), dtype, src + whole, factor, n - whole);
}

// The sum of every one of kLanes vectors.
CVMK_INLINE F sums_of_lanes(const F* x) {
  F sums;
#if defined(__AVX512F__)
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 one = simd::bits<__m512>(x[2 * i]), two = simd::bits<__m512>(x[2 * i + 1]);
    a[i] = _mm512_unpacklo_ps(one, two) + _mm512_unpackhi_ps(one, two);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d one = _mm512_castps_pd(a[2 * i]), two = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, two)) + _mm512_castpd_ps(_mm512_unpackhi_pd(one, two));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) c[i] = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd);
  sums = simd::bits<F>(_mm512_shuffle_f32x4(c[0], c[1], 0x88) + _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#else
  for (int i = 0; i < kLanes; ++i) sums[i] = sum_lanes(x[i]);
#endif
  return sums;
}

// Lanes of q . k; d is kPairs pairs of vectors, or anything where kPairs is 0.
template <Dtype kDtype, int kPairs>
CVMK_INLINE F direct_dot(const char* row, const float* q, int64_t d) {
  F even{}, odd{}, x, y;
  if (kPairs > 0) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs * kPair; i += kPair) {
      load_pair<kDtype>(row, i, &x, &y);
      even += x * simd::load(q + i);
      odd += y * simd::load(q + i + kLanes);
    }
    return even + odd;
  }
  int64_t i = 0;
  for (; i + kPair <= d; i += kPair) {
    load_pair<kDtype>(row, i, &x, &y);
    even += x * simd::load(q + i);
    odd += y * simd::load(q + i + kLanes);
  }
  for (; i < d; i += kLanes) even += elements::load_n(row, kDtype, i, static_cast<int>(least(kLanes, d - i))) * simd::load(q + i);
  return even + odd;
}

// Scores of `rows` queries with n keys from `keys` on, `stride` bytes apart; whole vectors of keys are written.
template <Dtype kDtype, int kPairs>
void direct_scores(const char* keys, int64_t stride, int64_t n, int64_t d, int64_t rows, const float* q, float* s, int64_t lds) {
  const int64_t bytes = d * size_of(kDtype);
  for (int64_t k = 0; k < n; k += kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      F lanes[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const char* row = keys + least(k + i, n - 1) * stride;
        if (r == 0)
          for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + kAhead * stride + at);
        lanes[i] = direct_dot<kDtype, kPairs>(row, q + r * up(d, kLanes), d);
      }
      simd::store(s + r * lds + k, sums_of_lanes(lanes));
    }
  }
}

// out[0, kPairs pairs) += the values [a, b) weighted by w: those of even and of odd keys apart.
template <Dtype kDtype, int kPairs>
CVMK_INLINE void direct_columns(const char* values, int64_t stride, int64_t a, int64_t b, const float* w, float* out) {
  F one[2 * kPairs], two[2 * kPairs], x, y;
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kPairs; ++i) {
    one[i] = simd::load(out + i * kLanes);
    two[i] = F{};
  }
  const char* row = values + a * stride;
  int64_t k = a;
  for (; k + 2 <= b; k += 2, row += 2 * stride) {
    const F w1 = simd::set(w[k]), w2 = simd::set(w[k + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      if (i * kPair * size_of(kDtype) % 64 == 0) {
        __builtin_prefetch(row + kAhead * stride + i * kPair * size_of(kDtype));
        __builtin_prefetch(row + (kAhead + 1) * stride + i * kPair * size_of(kDtype));
      }
      load_pair<kDtype>(row, i * kPair, &x, &y);
      one[2 * i] += x * w1;
      one[2 * i + 1] += y * w1;
      load_pair<kDtype>(row + stride, i * kPair, &x, &y);
      two[2 * i] += x * w2;
      two[2 * i + 1] += y * w2;
    }
  }
  if (k < b) {
    const F w1 = simd::set(w[k]);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      load_pair<kDtype>(row, i * kPair, &x, &y);
      one[2 * i] += x * w1;
      one[2 * i + 1] += y * w1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kPairs; ++i) simd::store(out + i * kLanes, one[i] + two[i]);
}

template <Dtype kDtype>
void direct_values(const char* values, int64_t stride, int64_t dv, int64_t a, int64_t b, const float* w, float* out) {
  int64_t i = 0;
  for (; i + 4 * kPair <= dv; i += 4 * kPair) direct_columns<kDtype, 4>(values + i * size_of(kDtype), stride, a, b, w, out + i);
  for (; i + 2 * kPair <= dv; i += 2 * kPair) direct_columns<kDtype, 2>(values + i * size_of(kDtype), stride, a, b, w, out + i);
  for (; i + kPair <= dv; i += kPair) direct_columns<kDtype, 1>(values + i * size_of(kDtype), stride, a, b, w, out + i);
  for (; i < dv; i += kLanes) {
    const int count = static_cast<int>(least(kLanes, dv - i));
    F sum = simd::load(out + i);
    for (int64_t k = a; k < b; ++k) sum += elements::load_n(values + k * stride, kDtype, i, count) * w[k];
    simd::store(out + i, sum);
  }
}

template <Dtype kDtype>
void direct_scores(const char* keys, int64_t stride, int64_t n, int64_t d, int64_t rows, const float* q, float* s, int64_t lds) {
  if (d == 4 * kPair) return direct_scores<kDtype, 4>(keys, stride, n, d, rows, q, s, lds);
  if (d == 2 * kPair) return direct_scores<kDtype, 2>(keys, stride, n, d, rows, q, s, lds);
  if (d == kPair) return direct_scores<kDtype, 1>(keys, stride, n, d, rows, q, s, lds);
  direct_scores<kDtype, 0>(keys, stride, n, d, rows, q, s, lds);
}

// The three steps for the dtype of the call: queries, scores of the keys from j on, values [j + a, j + b).
struct Direct {
  void (*query)(float* dst, const char* row, int64_t n);
  void (*scores)(const char* keys, int64_t stride, int64_t n, int64_t d, int64_t rows, const float* q, float* s, int64_t lds);
  void (*values)(const char* values, int64_t stride, int64_t dv, int64_t a, int64_t b, const float* w, float* out);
};

inline Direct direct_of(Dtype dtype) {
  using namespace cvmk::attention;
  if (dtype == kFloat32) return Direct{direct_row<kFloat32>, direct_scores<kFloat32>, direct_values<kFloat32>};
  if (dtype == kBFloat16) return Direct{direct_row<kBFloat16>, direct_scores<kBFloat16>, direct_values<kBFloat16>};
  return Direct{direct_row<kFloat16>, direct_scores<kFloat16>, direct_values<kFloat16>};
}

}  // namespace
}  // namespace cvmk::attention
