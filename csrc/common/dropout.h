// Dropout by a counter: whether an element stays is a hash of the seed and of where it stands. No mask is stored, for whoever needs it again makes it again.
//
// Element (group, i, j) stays where mix(row_hash(key, group, i) ^ column_hash(key, j)) >= limit; limit 0 drops nothing. cvmk/ops/_dropout.py makes key and
// limit of a seed and a probability, and has the formulas.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/inline.h"
#include "common/simd.h"

namespace cvmk {
namespace {

// The finaliser of MurmurHash3 (Appleby), on one word and on vectors of them.
template <typename T>
CVMK_INLINE T mix(T x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

CVMK_INLINE uint32_t row_hash(uint32_t key, int64_t group, int64_t i) { return mix(mix(key + static_cast<uint32_t>(group)) + static_cast<uint32_t>(i)); }

// Of the columns first to first + n - 1.
CVMK_INLINE void column_hashes(uint32_t key, int64_t first, int64_t n, uint32_t* hashes) {
  for (int64_t j = 0; j < n; ++j) hashes[j] = mix(key ^ mix(static_cast<uint32_t>(first + j)));
}

// Which elements of a row stay, for a vector of column hashes.
CVMK_INLINE simd::I kept(const uint32_t* columns, uint32_t row, uint32_t limit) {
  simd::U c;
  memcpy(&c, columns, sizeof c);
  return simd::bits<simd::I>(mix(c ^ row) >= limit);
}

}  // namespace
}  // namespace cvmk
