// Elements without gaps, in a type that is told beside them.
#pragma once

#include "common/dtype.h"

namespace cvmk {

// Null data where there are none.
struct Elements {
  void* data;
  Dtype dtype;
};

}  // namespace cvmk
