// The kernels of the distillation losses for one instruction-set level.
#include "distill/linear_float.inl"
#include "distill/linear_sweeps.inl"
#include "distill/rows.inl"
#if defined(__AMX_TILE__)
#include "distill/linear_tiles.inl"
#endif

namespace cvmk::distill {
namespace {

int64_t linear_scratch(const LinearPass& pass, const Team& team) {
#if defined(__AMX_TILE__)
  if (TileProducts::takes(pass)) return linear_scratch_with<TileProducts>(pass, team);
#endif
  return linear_scratch_with<FloatProducts>(pass, team);
}

void run_linear(const LinearPass& pass, char* scratch, const Team& team) {
#if defined(__AMX_TILE__)
  if (TileProducts::takes(pass)) return linear_with<TileProducts>(pass, scratch, team);
#endif
  linear_with<FloatProducts>(pass, scratch, team);
}

}  // namespace
}  // namespace cvmk::distill

CVMK_KERNELS(distill) = {{losses_scratch, run_losses}, {gradients_scratch, run_gradients}, {scale_scratch, run_scale}, {linear_scratch, run_linear}};
