#include "cached/params.h"
#include "common/levels.h"

CVMK_LEVELS(cached)

namespace cvmk::cached {

namespace {

const Kernels& with_pairs(bool& pairs) {
  const Dispatch dispatched = dispatch();
  pairs = dispatched.level >= IsaLevel::kAvx512 && dispatched.features.avx512_bf16;
  return kernels(dispatched.level);
}

}  // namespace

const Kernels& kernels_for(Attention& p) {
  const Dispatch dispatched = dispatch();
  p.vnni = dispatched.level >= IsaLevel::kAvx512 && dispatched.features.avx512_vnni;
  return with_pairs(p.pairs);
}
const Kernels& kernels_for(Append& p) { return with_pairs(p.pairs); }

}  // namespace cvmk::cached
