#include "common/levels.h"
#include "gemm/params.h"

CVMK_LEVELS(gemm)

namespace cvmk::gemm {

namespace {

const Kernels& with_vnni(bool& vnni) {
  const Dispatch dispatched = dispatch();
  vnni = dispatched.level >= IsaLevel::kAvx512 && dispatched.features.avx512_vnni;
  return kernels(dispatched.level);
}

}  // namespace

const Kernels& kernels_for(Int8Linear& p) { return with_vnni(p.vnni); }
const Kernels& kernels_for(Int4Bytes& p) { return with_vnni(p.vnni); }
const Kernels& kernels_for(ByteRows& p) { return with_vnni(p.vnni); }

}  // namespace cvmk::gemm
