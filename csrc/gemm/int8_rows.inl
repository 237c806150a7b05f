// Rows of int8_linear: quantised per token or by a given range, symmetric, after the optional smoothing scale.
#pragma once
#include "gemm/common.inl"

namespace cvmk::gemm {
namespace {

constexpr int64_t kSumRows = 256;                     // rows of sums that stand at one time
constexpr float kSmallest = 7.888609052210118e-31f;  // 2^-100, the floor of a row's largest magnitude

// The nearest integers, halves to even. The product before it must be rounded by itself, so no multiply-add may be formed here.
CVMK_INLINE I nearest(F x) {
#if defined(__AVX512F__)
  return simd::bits<I>(_mm512_cvtps_epi32(simd::bits<__m512>(x)));
#elif defined(__AVX2__)
  return simd::bits<I>(_mm256_cvtps_epi32(simd::bits<__m256>(x)));
#else
  __asm__("" : "+x"(x));
  return __builtin_convertvector(simd::round(x), I);
#endif
}

CVMK_INLINE I larger(I a, I b) {
#if defined(__AVX512F__)
  return simd::bits<I>(_mm512_max_epi32(simd::bits<__m512i>(a), simd::bits<__m512i>(b)));
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX512F__)
// The magnitude's bits of the largest of `inputs` 16-bit numbers, widened to those of a float; NaN counts as the largest.
template <Dtype kType>
inline int32_t largest_half(const uint16_t* x, int64_t inputs) {
  const __m512i mask = _mm512_set1_epi16(0x7FFF);
  __m512i a = _mm512_setzero_si512(), b = a;
  int64_t k = 0;
  for (; k + 64 <= inputs; k += 64) {
    a = _mm512_max_epu16(a, _mm512_and_si512(_mm512_loadu_si512(x + k), mask));
    b = _mm512_max_epu16(b, _mm512_and_si512(_mm512_loadu_si512(x + k + 32), mask));
  }
  for (; k < inputs; k += 32) {
    const __mmask32 some = inputs - k >= 32 ? 0xFFFFFFFFu : (1u << (inputs - k)) - 1u;
    a = _mm512_max_epu16(a, _mm512_and_si512(_mm512_maskz_loadu_epi16(some, x + k), mask));
  }
  a = _mm512_max_epu16(a, b);
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i flipped = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));  // the least of the complements
  const uint32_t bits = ~static_cast<uint32_t>(_mm_extract_epi16(flipped, 0)) & 0x7FFFu;
  if (kType == kBFloat16) return static_cast<int32_t>(bits << 16);
  return simd::bits<int32_t>(simd::half_to_float(static_cast<uint16_t>(bits)));
}

// quantise_chunk for 64 bfloat16 numbers: even and odd ones apart, for both are floats in place.
CVMK_INLINE void quantise_chunk_bf16(const uint16_t* x, float step, uint8_t flip, uint8_t* to) {
  __m512i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i both = _mm512_loadu_si512(x + 32 * i);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even, _mm512_set1_ps(step))), high = _mm512_cvtps_epi32(_mm512_mul_ps(odd, _mm512_set1_ps(step)));
    words[i] = _mm512_mask_blend_epi16(0xAAAAAAAAu, low, _mm512_slli_epi32(high, 16));
  }
  const __m512i bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi16(words[0], words[1]));
  _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(flip))));
}
#endif

// 64 inputs of a row times `step`, rounded, as signed bytes (plus 128 where `flip` is 0x80). kWithin: what is beyond +-127 is cut, and the magnitudes' bits
// raise `most`, which says of NaN that it is the largest.
template <Dtype kType, bool kWithin = false>
CVMK_INLINE void quantise_chunk(const void* x, const float* inverse, int64_t k, int64_t left, float step, uint8_t flip, uint8_t* to, I* most = nullptr) {
  I q[kStep / kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kStep / kLanes; ++i) {
    const int64_t rest = left - i * kLanes;
    const int n = rest >= kLanes ? kLanes : rest > 0 ? static_cast<int>(rest) : 0;
    F u = load_some<kType>(x, k + i * kLanes, n);
    if (inverse) u *= simd::load(inverse + k + i * kLanes);
    if (kWithin) *most = larger(*most, simd::bits<I>(simd::abs(u)));
    u *= step;
    if (kWithin) u = simd::min(simd::max(u, simd::set(-127.0f)), simd::set(127.0f));
    q[i] = nearest(u);
  }
#if defined(__AVX512F__)
  const __m512i low = _mm512_packs_epi32(simd::bits<__m512i>(q[0]), simd::bits<__m512i>(q[1]));
  const __m512i high = _mm512_packs_epi32(simd::bits<__m512i>(q[2]), simd::bits<__m512i>(q[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(flip))));
#else
  typedef int8_t B __attribute__((vector_size(kLanes)));
  for (int i = 0; i < kStep / kLanes; ++i) {
    const B b = __builtin_convertvector(q[i], B) ^ static_cast<int8_t>(flip);
    memcpy(to + i * kLanes, &b, sizeof b);
  }
#endif
}

CVMK_INLINE int32_t largest_lane(I most) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(simd::bits<__m512i>(most));
#else
  int32_t lanes[kLanes], bits = 0;
  memcpy(lanes, &most, sizeof lanes);
  for (int i = 0; i < kLanes; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
  return bits;
#endif
}

// The bits of the largest magnitude of a row, which order as the magnitudes do; NaN counts as the largest.
template <Dtype kType>
inline int32_t largest_bits(const void* x, const float* inverse, int64_t inputs) {
#if defined(__AVX512F__)
  if (kType != kFloat32 && !inverse) return largest_half<kType>(static_cast<const uint16_t*>(x), inputs);
#endif
  I most[2] = {I{}, I{}};
  int64_t k = 0;
  for (; k + 2 * kLanes <= inputs; k += 2 * kLanes)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      F u = load_as<kType>(x, k + j * kLanes);
      if (inverse) u *= simd::load(inverse + k + j * kLanes);
      most[j] = larger(most[j], simd::bits<I>(simd::abs(u)));
    }
  for (; k < inputs; k += kLanes) {
    const int n = static_cast<int>(least(kLanes, inputs - k));
    F u = load_some<kType>(x, k, n);
    if (inverse) u *= simd::load(inverse + k);
    most[0] = larger(most[0], simd::bits<I>(simd::abs(u)));
  }
  return largest_lane(larger(most[0], most[1]));
}

// quantise_row by a given range, in one pass.
template <Dtype kType>
inline float quantise_row_within(const void* x, const float* inverse, int64_t inputs, float range, uint8_t flip, uint8_t* to, int64_t chunk_stride) {
  const float largest = range > kSmallest ? range : kSmallest, step = 127.0f / largest;
  I most{};
  int64_t k = 0;
  for (; k + kStep <= inputs; k += kStep, to += chunk_stride) quantise_chunk<kType, true>(x, inverse, k, kStep, step, flip, to, &most);
  if (k < inputs) quantise_chunk<kType, true>(x, inverse, k, inputs - k, step, flip, to, &most);
  return largest_lane(most) < 0x7F800000 ? largest / 127.0f : __builtin_nanf("");
}

// A row as bytes: chunk c of 64 inputs at to + c * chunk_stride, zeros behind the last input. Returns a / 127, NaN where the row is not finite.
template <Dtype kType>
inline float quantise_row(const void* x, const float* inverse, int64_t inputs, uint8_t flip, uint8_t* to, int64_t chunk_stride, float range = 0) {
  if (range > 0) return quantise_row_within<kType>(x, inverse, inputs, range, flip, to, chunk_stride);
  const int32_t bits = largest_bits<kType>(x, inverse, inputs);
  const bool finite = bits < 0x7F800000;
  const float found = finite ? simd::bits<float>(bits) : 1.0f, largest = found > kSmallest ? found : kSmallest, step = 127.0f / largest;
  int64_t k = 0;
  for (; k + kStep <= inputs; k += kStep, to += chunk_stride) {
#if defined(__AVX512F__)
    if (kType == kBFloat16 && !inverse) {
      quantise_chunk_bf16(static_cast<const uint16_t*>(x) + k, step, flip, to);
      continue;
    }
#endif
    quantise_chunk<kType>(x, inverse, k, kStep, step, flip, to);
  }
  if (k < inputs) quantise_chunk<kType>(x, inverse, k, inputs - k, step, flip, to);
  return finite ? largest / 127.0f : __builtin_nanf("");
}

// Whether so many rows are multiplied by tiles; their bytes then stand in tiles.
inline bool in_tiles(int64_t rows, bool vnni) { return CVMK_GEMM_TILES && rows > (vnni ? 4 : 0); }

// Where the bytes of row r begin.
CVMK_INLINE uint8_t* byte_row(uint8_t* bytes, int64_t r, int64_t padded, bool tiles) {
  return tiles ? bytes + r / kPanel * kPanel * padded + r % kPanel * kStep : bytes + r * padded;
}

inline float quantise(const Int8Linear& p, const float* inverse, int64_t row, uint8_t flip, uint8_t* to, int64_t chunk_stride) {
  const Linear& l = p.linear;
  const char* x = static_cast<const char*>(l.x) + row * l.x_stride * size_of(l.x_dtype);
  if (l.x_dtype == kFloat32) return quantise_row<kFloat32>(x, inverse, l.inputs, flip, to, chunk_stride, p.range);
  if (l.x_dtype == kBFloat16) return quantise_row<kBFloat16>(x, inverse, l.inputs, flip, to, chunk_stride, p.range);
  return quantise_row<kFloat16>(x, inverse, l.inputs, flip, to, chunk_stride, p.range);
}

inline void invert(const Int8Linear& p, float* inverse, int64_t padded) {
  const int64_t inputs = p.linear.inputs;
  for (int64_t k = 0; k < padded; k += kLanes) {
    const int64_t left = inputs - k;
    const int n = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
    simd::store(inverse + k, 1.0f / elements::load_n(p.smooth_scale, p.smooth_dtype, k, n));
  }
  for (int64_t k = inputs; k < padded; ++k) inverse[k] = 1.0f;
}

}  // namespace
}  // namespace cvmk::gemm
