// Linear layers and their gradients for one instruction-set level.
#include "linear/backward.inl"
#include "linear/float_products.inl"
#include "linear/pair_products.inl"

namespace cvmk::linear {
namespace {

int64_t forward_scratch(const Forward& p, const Team& team) {
#if defined(__AVX512F__)
  if (p.linear.pairs) return forward_scratch_with<PairProducts>(p, team);
#endif
  return forward_scratch_with<FloatProducts>(p, team);
}

void run_forward(const Forward& p, char* scratch, const Team& team) {
#if defined(__AVX512F__)
  if (p.linear.pairs) return forward_with<PairProducts>(p, scratch, team);
#endif
  forward_with<FloatProducts>(p, scratch, team);
}

int64_t backward_scratch(const Backward& p, const Team& team) {
#if defined(__AVX512F__)
  if (p.linear.pairs) return backward_scratch_with<PairProducts>(p, team);
#endif
  return backward_scratch_with<FloatProducts>(p, team);
}

void run_backward(const Backward& p, char* scratch, const Team& team) {
#if defined(__AVX512F__)
  if (p.linear.pairs) return backward_with<PairProducts>(p, scratch, team);
#endif
  backward_with<FloatProducts>(p, scratch, team);
}

}  // namespace
}  // namespace cvmk::linear

CVMK_KERNELS(linear) = {{forward_scratch, run_forward}, {backward_scratch, run_backward}};
