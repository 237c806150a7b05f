// Arithmetic of sizes.
#pragma once

#include <stdint.h>

#include "common/inline.h"

namespace cvmk {

CVMK_ANYWHERE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
CVMK_ANYWHERE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// How many pieces of `size` hold n, and the size of so many.
CVMK_ANYWHERE constexpr int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
CVMK_ANYWHERE constexpr int64_t up(int64_t n, int64_t size) { return pieces(n, size) * size; }

}  // namespace cvmk
