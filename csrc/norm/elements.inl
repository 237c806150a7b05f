// Vectors of a row whose type is a template's argument, or known at run time only (kNoDtype); whole ones, and the last one of a row.
#pragma once
#include "common/dropout.h"
#include "common/elements.h"
#include "norm/params.h"
#include "norm/rows.inl"

namespace cvmk::norm {
namespace {

constexpr int64_t kFewElements = 1 << 14;  // below, other threads are not worth waking

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

// What the threads read beside the rows: weight and bias [padded] as floats, and the columns' hashes.
struct Columns {
  const float *weight, *bias;
  const uint32_t* hashes;
};

// Room for them; `fill` writes them.
struct ColumnsPlan {
  int64_t padded;
  float *weight, *bias;
  uint32_t* hashes;

  ColumnsPlan(const Shape& s, bool has_bias, Arena* a) : padded(up(s.n, kLanes)) {
    weight = a->take<float>(padded);
    bias = has_bias ? a->take<float>(padded) : nullptr;
    hashes = s.dropout_limit != 0 ? a->take<uint32_t>(padded) : nullptr;
  }
  Columns fill(const Shape& s, const Elements& from) const {
    elements::to_floats(weight, s.weight.data, s.weight.dtype, s.n, padded);
    if (bias != nullptr) elements::to_floats(bias, from.data, from.dtype, s.n, padded);
    if (hashes != nullptr) column_hashes(s.dropout_key, 0, padded, hashes);
    return {weight, bias, hashes};
  }
};

}  // namespace
}  // namespace cvmk::norm
