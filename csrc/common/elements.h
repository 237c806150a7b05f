// Elements of any type as vectors of floats, for the instruction set that the including file is compiled for.
//
// `load` and `store` take a whole vector, those with _n its first n elements (0 <= n <= kLanes: the other lanes are 0, and memory behind them
// is neither read nor written). The type is a template's argument where a loop runs over many vectors, else an argument.
#pragma once

#include "common/dtype.h"
#include "common/simd.h"
#include "common/sizes.h"

namespace {
namespace elements {

using cvmk::Dtype;
using simd::F;
using simd::H;
using simd::kLanes;

// To the nearest bfloat16. The instruction of the amx level takes subnormal numbers for 0.
CVMK_INLINE H round_bf16(F x) {
#if defined(__AVX512BF16__)
  return simd::bits<H>(_mm512_cvtneps_pbh(simd::bits<__m512>(x)));
#else
  return simd::to_bf16(x);
#endif
}

// The halves of a vector in one of the two types of 16 bits, and back.
template <Dtype kType>
CVMK_INLINE F widen(H h) {
  return kType == cvmk::kBFloat16 ? simd::from_bf16(h) : simd::from_half(h);
}
template <Dtype kType>
CVMK_INLINE H narrow(F x) {
  return kType == cvmk::kBFloat16 ? round_bf16(x) : simd::to_half(x);
}

// -- a type that is known where the code is compiled --------------------------------------------------------------------------------
template <Dtype kType>
CVMK_INLINE F load_n(const void* p, int n) {
  if (kType == cvmk::kFloat32) return simd::load_n(static_cast<const float*>(p), n);
  if (kType == cvmk::kFloat64) {
    F v{};
    for (int i = 0; i < n; ++i) v[i] = static_cast<float>(static_cast<const double*>(p)[i]);
    return v;
  }
  return widen<kType>(simd::load_h_n(static_cast<const uint16_t*>(p), n));
}
template <Dtype kType>
CVMK_INLINE F load(const void* p) {
  if (kType == cvmk::kFloat32) return simd::load(static_cast<const float*>(p));
  if (kType == cvmk::kFloat64) return load_n<kType>(p, kLanes);
  return widen<kType>(simd::load_h(static_cast<const uint16_t*>(p)));
}
template <Dtype kType>
CVMK_INLINE float load_one(const void* p) {
  if (kType == cvmk::kFloat32) return *static_cast<const float*>(p);
  if (kType == cvmk::kFloat64) return static_cast<float>(*static_cast<const double*>(p));
  const uint16_t h = *static_cast<const uint16_t*>(p);
  return kType == cvmk::kBFloat16 ? simd::bits<float>(static_cast<uint32_t>(h) << 16) : simd::half_to_float(h);
}
template <Dtype kType>
CVMK_INLINE void store_n(void* p, F x, int n) {
  if (kType == cvmk::kFloat32) return simd::store_n(static_cast<float*>(p), x, n);
  if (kType == cvmk::kFloat64) {
    float from[kLanes];
    simd::store(from, x);
    for (int i = 0; i < n; ++i) static_cast<double*>(p)[i] = static_cast<double>(from[i]);
    return;
  }
  simd::store_h_n(static_cast<uint16_t*>(p), narrow<kType>(x), n);
}
template <Dtype kType>
CVMK_INLINE void store(void* p, F x) {
  if (kType == cvmk::kFloat32) return simd::store(static_cast<float*>(p), x);
  if (kType == cvmk::kFloat64) return store_n<kType>(p, x, kLanes);
  simd::store_h(static_cast<uint16_t*>(p), narrow<kType>(x));
}

// A whole vector past the caches where the level has such writes; p is a multiple of the vector's size. Float32 and the types of 16 bits.
template <Dtype kType>
CVMK_INLINE void stream(void* p, F x) {
  static_assert(kType != cvmk::kFloat64, "nothing streams float64");
#if defined(__AVX512F__)
  if (kType == cvmk::kFloat32) return _mm512_stream_ps(static_cast<float*>(p), simd::bits<__m512>(x));
  _mm256_stream_si256(static_cast<__m256i*>(p), simd::bits<__m256i>(narrow<kType>(x)));
#elif defined(__AVX2__)
  if (kType == cvmk::kFloat32) return _mm256_stream_ps(static_cast<float*>(p), simd::bits<__m256>(x));
  _mm_stream_si128(static_cast<__m128i*>(p), simd::bits<__m128i>(narrow<kType>(x)));
#else
  store<kType>(p, x);
#endif
}
// Other threads see what was streamed after this.
CVMK_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// -- a type that is known at run time -----------------------------------------------------------------------------------------------
CVMK_INLINE const char* at(const void* data, Dtype type, int64_t index) { return static_cast<const char*>(data) + index * cvmk::size_of(type); }
CVMK_INLINE char* at(void* data, Dtype type, int64_t index) { return static_cast<char*>(data) + index * cvmk::size_of(type); }

// body(Type<kType>{}) for the floating type that `type` names.
template <Dtype kType>
struct Type {
  static constexpr Dtype value = kType;
};
template <typename Body>
CVMK_INLINE auto with_type(Dtype type, const Body& body) {
  if (type == cvmk::kFloat32) return body(Type<cvmk::kFloat32>{});
  if (type == cvmk::kBFloat16) return body(Type<cvmk::kBFloat16>{});
  if (type == cvmk::kFloat16) return body(Type<cvmk::kFloat16>{});
  return body(Type<cvmk::kFloat64>{});
}

// float64 apart: it is rare, and its loops would stand in every inner loop.
inline __attribute__((noinline, cold, unused)) F load_doubles(const void* p, int n) { return load_n<cvmk::kFloat64>(p, n); }
inline __attribute__((noinline, cold, unused)) void store_doubles(void* p, F x, int n) { store_n<cvmk::kFloat64>(p, x, n); }

// The address of an element in the branch that knows its size.
template <Dtype kType>
CVMK_INLINE const char* at(const void* data, int64_t index) {
  return static_cast<const char*>(data) + index * cvmk::size_of(kType);
}
template <Dtype kType>
CVMK_INLINE char* at(void* data, int64_t index) {
  return static_cast<char*>(data) + index * cvmk::size_of(kType);
}

CVMK_INLINE F load(const void* data, Dtype type, int64_t index) {
  if (type == cvmk::kFloat32) return load<cvmk::kFloat32>(at<cvmk::kFloat32>(data, index));
  if (type == cvmk::kBFloat16) return load<cvmk::kBFloat16>(at<cvmk::kBFloat16>(data, index));
  return type == cvmk::kFloat16 ? load<cvmk::kFloat16>(at<cvmk::kFloat16>(data, index)) : load_doubles(at<cvmk::kFloat64>(data, index), kLanes);
}
CVMK_INLINE F load_n(const void* data, Dtype type, int64_t index, int n) {
  if (n == kLanes) return load(data, type, index);
  if (type == cvmk::kFloat32) return load_n<cvmk::kFloat32>(at<cvmk::kFloat32>(data, index), n);
  if (type == cvmk::kBFloat16) return load_n<cvmk::kBFloat16>(at<cvmk::kBFloat16>(data, index), n);
  return type == cvmk::kFloat16 ? load_n<cvmk::kFloat16>(at<cvmk::kFloat16>(data, index), n) : load_doubles(at<cvmk::kFloat64>(data, index), n);
}
CVMK_INLINE float load_one(const void* data, Dtype type, int64_t index) {
  if (type == cvmk::kFloat32) return load_one<cvmk::kFloat32>(at<cvmk::kFloat32>(data, index));
  if (type == cvmk::kBFloat16) return load_one<cvmk::kBFloat16>(at<cvmk::kBFloat16>(data, index));
  return type == cvmk::kFloat16 ? load_one<cvmk::kFloat16>(at<cvmk::kFloat16>(data, index)) : load_one<cvmk::kFloat64>(at<cvmk::kFloat64>(data, index));
}
CVMK_INLINE void store(void* data, Dtype type, int64_t index, F x) {
  if (type == cvmk::kFloat32) return store<cvmk::kFloat32>(at<cvmk::kFloat32>(data, index), x);
  if (type == cvmk::kBFloat16) return store<cvmk::kBFloat16>(at<cvmk::kBFloat16>(data, index), x);
  type == cvmk::kFloat16 ? store<cvmk::kFloat16>(at<cvmk::kFloat16>(data, index), x) : store_doubles(at<cvmk::kFloat64>(data, index), x, kLanes);
}
CVMK_INLINE void store_n(void* data, Dtype type, int64_t index, F x, int n) {
  if (n == kLanes) return store(data, type, index, x);
  if (type == cvmk::kFloat32) return store_n<cvmk::kFloat32>(at<cvmk::kFloat32>(data, index), x, n);
  if (type == cvmk::kBFloat16) return store_n<cvmk::kBFloat16>(at<cvmk::kBFloat16>(data, index), x, n);
  type == cvmk::kFloat16 ? store_n<cvmk::kFloat16>(at<cvmk::kFloat16>(data, index), x, n) : store_doubles(at<cvmk::kFloat64>(data, index), x, n);
}

// -- rows ---------------------------------------------------------------------------------------------------------------------------
// to[0, n) = from as floats, then zeros up to `padded`, a multiple of the lanes. Null: all zeros.
inline __attribute__((unused)) void to_floats(float* to, const void* from, Dtype type, int64_t n, int64_t padded) {
  if (from == nullptr) n = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) simd::store(to + i, load(from, type, i));
  if (i < n) {
    simd::store(to + i, load_n(from, type, i, static_cast<int>(n - i)));
    i += kLanes;
  }
  for (; i < padded; i += kLanes) simd::store(to + i, F{});
}

// to[0, n) = factor * from, rounded to the type.
template <Dtype kType>
inline __attribute__((unused)) void from_floats_as(void* to, const float* from, float factor, int64_t n) {
  constexpr int64_t kSize = cvmk::size_of(kType);
  char* p = static_cast<char*>(to);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<kType>(p + i * kSize, simd::load(from + i) * factor);
  const int left = static_cast<int>(n - i);
  if (left > 0) store_n<kType>(p + i * kSize, simd::load_n(from + i, left) * factor, left);
}
CVMK_INLINE void from_floats(void* to, Dtype type, const float* from, float factor, int64_t n) {
  if (type == cvmk::kFloat32) return from_floats_as<cvmk::kFloat32>(to, from, factor, n);
  if (type == cvmk::kBFloat16) return from_floats_as<cvmk::kBFloat16>(to, from, factor, n);
  type == cvmk::kFloat16 ? from_floats_as<cvmk::kFloat16>(to, from, factor, n) : from_floats_as<cvmk::kFloat64>(to, from, factor, n);
}

}  // namespace elements
}  // namespace
