#include <algorithm>

#include "attention/params.h"
#include "common/levels.h"

CVMK_LEVELS(attention)

const cvmk::attention::Kernels& cvmk::attention::kernels(Dtype dtype) {
  const IsaLevel level = dispatch_level();
  return kernels(dtype == kBFloat16 ? level : std::min(level, IsaLevel::kAvx512));
}
