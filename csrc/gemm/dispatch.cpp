#include "common/levels.h"
#include "gemm/params.h"

CVMK_LEVELS(gemm)

namespace cvmk::gemm {

const Kernels& kernels_for(Int8Linear& p) {
  const Dispatch dispatched = dispatch();
  p.vnni = dispatched.level >= IsaLevel::kAvx512 && dispatched.features.avx512_vnni;
  return kernels(dispatched.level);
}

}  // namespace cvmk::gemm
