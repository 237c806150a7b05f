// Vectors of a row whose type is a template's argument, or known at run time only (kNoDtype); whole ones, and the last one of a row.
#pragma once

#include "common/elements.h"
#include "common/view.h"

namespace cvmk {
namespace {

using simd::F;
using simd::kLanes;

// How many lanes of a vector are in the row.
struct All {};
struct First {
  int count;
};

template <Dtype kType>
CVMK_INLINE F get(const Elements& x, int64_t i, All) {
  if constexpr (kType == kNoDtype) return elements::load(x.data, x.dtype, i);
  else return elements::load<kType>(elements::at<kType>(static_cast<const void*>(x.data), i));
}
template <Dtype kType>
CVMK_INLINE F get(const Elements& x, int64_t i, First first) {
  if constexpr (kType == kNoDtype) return elements::load_n(x.data, x.dtype, i, first.count);
  else return elements::load_n<kType>(elements::at<kType>(static_cast<const void*>(x.data), i), first.count);
}
template <Dtype kType>
CVMK_INLINE void put(const Elements& x, int64_t i, F v, All) {
  if constexpr (kType == kNoDtype) elements::store(x.data, x.dtype, i, v);
  else elements::store<kType>(elements::at<kType>(x.data, i), v);
}
template <Dtype kType>
CVMK_INLINE void put(const Elements& x, int64_t i, F v, First first) {
  if constexpr (kType == kNoDtype) elements::store_n(x.data, x.dtype, i, v, first.count);
  else elements::store_n<kType>(elements::at<kType>(x.data, i), v, first.count);
}

// v as the type holds it.
template <Dtype kType>
CVMK_INLINE F rounded(F v, Dtype type) {
  if constexpr (kType == kNoDtype) {
    if (type == kBFloat16) return elements::widen<kBFloat16>(elements::narrow<kBFloat16>(v));
    if (type == kFloat16) return elements::widen<kFloat16>(elements::narrow<kFloat16>(v));
    return v;
  } else if constexpr (kType == kFloat32) {
    return v;
  } else {
    return elements::widen<kType>(elements::narrow<kType>(v));
  }
}

// body(i, All or First) for the vectors of a row.
template <typename Body>
CVMK_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, All{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

}  // namespace
}  // namespace cvmk
