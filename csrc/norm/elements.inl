// What training's passes over rows share.
#pragma once
#include "common/dropout.h"
#include "common/lanes.h"
#include "norm/params.h"
#include "norm/rows.inl"

namespace cvmk::norm {
namespace {

constexpr int64_t kFewElements = 1 << 14;  // below, other threads are not worth waking

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
