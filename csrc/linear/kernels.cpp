// Linear layers and their gradients for one instruction-set level.
#include "linear/backward.inl"
#include "linear/float_products.inl"
#include "linear/pair_products.inl"
#include "linear/tile_products.inl"

namespace cvmk::linear {
namespace {

#if defined(__AMX_TILE__)
typedef TileProducts LoweredProducts;
#elif defined(__AVX512F__)
typedef PairProducts LoweredProducts;
#else
typedef FloatProducts LoweredProducts;
#endif

int64_t forward_scratch(const Forward& p, const Team& team) {
  return p.linear.pairs ? forward_scratch_with<LoweredProducts>(p, team) : forward_scratch_with<FloatProducts>(p, team);
}

void run_forward(const Forward& p, char* scratch, const Team& team) {
  p.linear.pairs ? forward_with<LoweredProducts>(p, scratch, team) : forward_with<FloatProducts>(p, scratch, team);
}

int64_t backward_scratch(const Backward& p, const Team& team) {
  return p.linear.pairs ? backward_scratch_with<LoweredProducts>(p, team) : backward_scratch_with<FloatProducts>(p, team);
}

void run_backward(const Backward& p, char* scratch, const Team& team) {
  p.linear.pairs ? backward_with<LoweredProducts>(p, scratch, team) : backward_with<FloatProducts>(p, scratch, team);
}

}  // namespace
}  // namespace cvmk::linear

CVMK_KERNELS(linear) = {{forward_scratch, run_forward}, {backward_scratch, run_backward}};
