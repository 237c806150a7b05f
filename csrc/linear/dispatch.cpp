#include "common/levels.h"
#include "linear/params.h"

CVMK_LEVELS(linear)

namespace cvmk::linear {

const Kernels& kernels_for(Linear& linear) {
  const Dispatch dispatched = dispatch();
  linear.pairs = linear.dtype == kBFloat16 && dispatched.level >= IsaLevel::kAvx512 && dispatched.features.avx512_bf16;
  return kernels(linear.dtype == kBFloat16 || dispatched.level < IsaLevel::kAmx ? dispatched.level : IsaLevel::kAvx512);
}

}  // namespace cvmk::linear
